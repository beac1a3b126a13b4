"""What the board says of itself: temperature, and whether it is slowed by heat or a weak supply."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"
SLOWED_NOW = 0b1111
"""Bits of the Raspberry Pi's get_throttled that hold now: under-voltage, capped, throttled, soft limit."""


@dataclass(frozen=True)
class Board:
    """Degrees Celsius, None where there is no thermometer; whether the processor is held back now."""

    temperature: float | None
    throttled: bool


def read(sysfs: Path = Path("/sys")) -> Board:
    temperature = None
    for zone in sorted((sysfs / "class/thermal").glob("thermal_zone*/temp")):
        text = _text(zone)
        if text and text.lstrip("-").isdigit():
            temperature = int(text) / 1000
            break
    flags = _text(sysfs / THROTTLED)
    return Board(temperature, bool(flags and int(flags, 16) & SLOWED_NOW))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""
