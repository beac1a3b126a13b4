"""What the board reports: its temperature, and whether heat or a weak supply slows it down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

THROTTLED = "devices/platform/soc*/soc*:firmware/get_throttled"
"""The file with the Raspberry Pi's flags. The name of the firmware's node differs from board to board."""

UNDER_VOLTAGE, SLOWED = 1 << 0, 0b1110
"""Flags of what is so now: the supply is weak; the clock is capped, throttled or at its soft limit of temperature."""

SINCE_START = 16
"""The same flags, so many bits to the left, say what was so at some time since the start."""


@dataclass(frozen=True)
class Board:
    """What the board reports. None: it does not say."""

    temperature: float | None  # degrees Celsius
    flags: int | None  # the Raspberry Pi's

    @property
    def throttled(self) -> bool | None:
        """Whether the processor is held back now."""
        return None if self.flags is None else bool(self.flags & (UNDER_VOLTAGE | SLOWED))


def read(sysfs: Path = Path("/sys")) -> Board:
    """What the board reports now."""
    temperature = _number(sysfs / "class/thermal", "thermal_zone*/temp", 10)
    return Board(None if temperature is None else temperature / 1000, _number(sysfs, THROTTLED, 16))


def _number(folder: Path, pattern: str, base: int) -> int | None:
    """The number in the first file of a pattern that has one. None if none has."""
    for path in sorted(folder.glob(pattern)):
        try:
            return int(path.read_text("ascii"), base)
        except (OSError, ValueError):
            continue
    return None
