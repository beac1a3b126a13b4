"""The kinds of value that flashd.yaml may hold, each with its range and the words for it."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from flashd.system.memory import SIZE

READ = "read"
"""The key of a Meta's `extra` for the function that reads a value as people write it. It raises ValueError."""

WRITTEN = "written"
"""The key of a Meta's `extra_json_schema` for the JSON types that people may write, if they are more than is made of
them. msgspec does not let `type` be said there."""

ONE_WIRE_FAMILIES = ("28", "10", "22", "3b", "42")
"""Thermometers: DS18B20, DS18S20, DS1822, DS1825, DS28EA00."""

HEADER = {
    3: 2, 5: 3, 7: 4, 8: 14, 10: 15, 11: 17, 12: 18, 13: 27, 15: 22, 16: 23, 18: 24, 19: 10, 21: 9, 22: 25, 23: 11,
    24: 8, 26: 7, 27: 0, 28: 1, 29: 5, 31: 6, 32: 12, 33: 13, 35: 19, 36: 16, 37: 26, 38: 20, 40: 21,
}  # fmt: skip
"""Places on a Raspberry Pi's header of 40 pins -> GPIO lines."""

LAST_PIN = 63
PIN_WORDS = f"a GPIO line's number from 0 to {LAST_PIN}, such as 17 or GPIO17"


def read_pin(value: Any) -> int:
    """A pin as people write it. A place on the header is refused, since it is another line on another board."""
    text = str(value)
    if line := re.fullmatch(r"(?:GPIO|BCM)?(0|[1-9][0-9]?)", text, re.IGNORECASE):
        if int(line[1]) <= LAST_PIN:
            return int(line[1])
    elif place := re.fullmatch(r"(?:BOARD|J8:|P1:)([0-9]{1,2})", text, re.IGNORECASE):
        meant = HEADER.get(int(place[1]))
        if meant is None:
            raise ValueError(f"{text} is a place on the header that has no GPIO line")
        raise ValueError(f"{text} is a place on the header; on a Raspberry Pi it is GPIO{meant}: write {meant}")
    elif re.fullmatch(r"0[0-9]{1,2}", text):
        raise ValueError(f"write {int(text)} and not {text}: YAML takes a number that begins with 0 for an octal one")
    raise ValueError(f"expected {PIN_WORDS}")


def read_loopback(value: Any) -> Any:
    """A port of 127.0.0.1; an address is refused with the reason."""
    if isinstance(value, str) and re.search(r"\d\.\d|::|localhost", value):
        raise ValueError(
            "expected a port alone, such as 8080: flashd listens on 127.0.0.1 and on no other address, since whoever"
            " reaches the port may ask and read everything. From another machine: ssh -L 8080:127.0.0.1:8080 BOARD."
            " A page for phones on the local network, with a PIN: api.network"
        )
    return value


CODE_WORDS = "the PIN of the page: 6 to 12 digits"
RUNS = "01234567890123456789"


def read_code(value: Any) -> Any:
    """The page's PIN, in quotes or without. One that everybody tries first is refused."""
    text = str(value)
    if not re.fullmatch("[0-9]{6,12}", text):
        raise ValueError(f"expected {CODE_WORDS}")
    if len(set(text)) == 1 or text in RUNS or text[::-1] in RUNS:
        raise ValueError("everybody tries this PIN first: take another one")
    return text


def _text(pattern: str, words: str) -> msgspec.Meta:
    """A text that matches a pattern, and in words what that allows."""
    return msgspec.Meta(pattern=pattern, description=words)


Name = Annotated[
    str, _text(r"^[a-z][a-z0-9_-]{0,31}\Z", "a name: a small letter, then up to 31 small letters, digits, - and _")
]
Size = Annotated[str, _text(SIZE, "a size, such as 512M or 1.5G")]
TimeOfDay = Annotated[str, _text(r"^([01]?\d|2[0-3]):[0-5]\d\Z", "a time of day, such as 07:30")]
OneWireId = Annotated[
    str,
    _text(
        rf"^({'|'.join(ONE_WIRE_FAMILIES)})-[0-9a-f]{{12}}\Z",
        "a thermometer's name in /sys/bus/w1/devices: "
        + ", ".join(f"{family}-" for family in ONE_WIRE_FAMILIES[:-1])
        + f" or {ONE_WIRE_FAMILIES[-1]}- and twelve digits 0 to f",
    ),
]
Channel = Annotated[str, _text(r"^[a-z0-9_]{1,40}\Z", "a channel's name, such as temp or voltage0")]
Pin = Annotated[
    int,
    msgspec.Meta(
        ge=0, le=LAST_PIN, description=PIN_WORDS, extra={READ: read_pin},
        extra_json_schema={WRITTEN: ["integer", "string"], "pattern": "^(GPIO|BCM)?[0-9]+$"},
    ),
]  # fmt: skip
"""The number of a GPIO line. Whatever is of this type is a pin that nobody else may use: see pins.py."""
Loopback = Annotated[
    int, msgspec.Meta(ge=1, le=65535, description="a port of 127.0.0.1, such as 8080", extra={READ: read_loopback})
]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Code = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9]{6,12}\Z", description=CODE_WORDS, extra={READ: read_code},
        extra_json_schema={WRITTEN: ["integer", "string"]},
    ),
]  # fmt: skip
Absolute = Annotated[str, _text(r"^/", "a path that begins with /")]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=10)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
Priority = Annotated[int, msgspec.Meta(ge=0, le=9)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400 * 366)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=86400 * 366)]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=6000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the file in which every key is known."""
