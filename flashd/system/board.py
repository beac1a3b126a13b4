"""What the board says of itself: temperature, and whether it is slowed by heat or a weak supply."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

THROTTLED = "devices/platform/soc*/soc*:firmware/get_throttled"
"""The Raspberry Pi's flags; what the firmware's node is called differs from board to board."""

UNDER_VOLTAGE, SLOWED = 1 << 0, 0b1110
"""Bits that hold now: the supply is weak; capped, throttled, soft limit of temperature."""

SINCE_START = 16
"""The same bits so far to the left have held at some time since the start."""


@dataclass(frozen=True)
class Board:
    """Degrees Celsius and the Raspberry Pi's flags, None where the board does not say."""

    temperature: float | None
    flags: int | None

    @property
    def throttled(self) -> bool | None:
        """Whether the processor is held back now."""
        return None if self.flags is None else bool(self.flags & (UNDER_VOLTAGE | SLOWED))


def read(sysfs: Path = Path("/sys")) -> Board:
    temperature = _number(sysfs / "class/thermal", "thermal_zone*/temp", 10)
    return Board(None if temperature is None else temperature / 1000, _number(sysfs, THROTTLED, 16))


def _number(folder: Path, pattern: str, base: int) -> int | None:
    """What the first file of a pattern says that says a number."""
    for path in sorted(folder.glob(pattern)):
        try:
            return int(path.read_text("ascii"), base)
        except (OSError, ValueError):
            continue
    return None
