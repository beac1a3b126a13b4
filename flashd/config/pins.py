"""The pins of a configuration, found by their type: whatever is a `Pin` of fields.py, in whichever entry."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from flashd.config.fields import READ, read_pin

Path = tuple[str | int, ...]


class PinUse(NamedTuple):
    """A pin, the path to it, and the struct that has it."""

    pin: int
    path: Path
    owner: Any


def pins_in(struct: msgspec.Struct, path: Path = ()) -> Iterator[PinUse]:
    """Every pin of a struct and of the structs that it holds."""
    for name, kind in _fields(type(struct)):
        value = getattr(struct, name)
        for step, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
            here = (*path, name) if step is None else (*path, name, step)
            if isinstance(each, msgspec.Struct):
                yield from pins_in(each, here)
            elif each is not None and _is_pin(kind):
                yield PinUse(each, here, struct)


@cache
def _fields(kind: type[msgspec.Struct]) -> list[tuple[str, inspect.Type]]:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return [(field.name, field.type) for field in described.fields]


def _is_pin(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.Metadata):
        return (kind.extra or {}).get(READ) is read_pin or _is_pin(kind.type)
    if isinstance(kind, inspect.UnionType):
        return any(_is_pin(each) for each in kind.types)
    return isinstance(kind, inspect.ListType) and _is_pin(kind.item_type)
