"""The kinds of value that flashd.yaml may hold, each with its range and the words for it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from flashd.system.memory import SIZE


def _text(pattern: str, words: str) -> msgspec.Meta:
    """A text that matches a pattern, and in words what that allows."""
    return msgspec.Meta(pattern=pattern, description=words)


Name = Annotated[
    str, _text(r"^[a-z][a-z0-9_-]{0,31}\Z", "a name: a small letter, then up to 31 small letters, digits, - and _")
]
Size = Annotated[str, _text(SIZE, "a size, such as 512M or 1.5G")]
TimeOfDay = Annotated[str, _text(r"^([01]\d|2[0-3]):[0-5]\d\Z", "a time of day in quotes, such as '07:30'")]
OneWireId = Annotated[
    str, _text(r"^28-[0-9a-f]{12}\Z", "28- and twelve digits 0 to f, as /sys/bus/w1/devices names it")
]
Channel = Annotated[str, _text(r"^[a-z0-9_]{1,40}\Z", "a channel's name, such as temp or voltage0")]
Pin = Annotated[int, msgspec.Meta(ge=0, le=63)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=10)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
Priority = Annotated[int, msgspec.Meta(ge=0, le=9)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400 * 366)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=86400 * 366)]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=6000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the file in which every key is known."""
