"""Objects of a client's request."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from flashd.errors import BadField

T = TypeVar("T")


class Known(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object in which every field is known."""


def read(data: bytes | bytearray, kind: type[T]) -> T:
    """What a request says. Raises NOT_JSON if it is not of this kind, BadField for a name that stands twice.

    Of such a name msgspec would take the last value, and ignore the others.
    """
    value = msgspec.json.decode(data, type=kind)
    json.loads(data, object_pairs_hook=_check_once, parse_int=_nothing, parse_float=_nothing)
    return value


def _check_once(pairs: list[tuple[str, Any]]) -> None:
    names = set[str]()
    for name, _ in pairs:
        if name in names:
            raise BadField(name[:100], "the name stands twice in one object; send it once")
        names.add(name)


def _nothing(_: str) -> None:
    """In place of a number: what is only looked through takes no memory."""
