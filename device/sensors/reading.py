"""What a sensor says, and what every kind of sensor offers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

DIGITS = 4
"""Digits of a reading in words, but for the whole ones of a large number."""


@dataclass(frozen=True)
class Reading:
    """What a sensor said. In words it is `unknown` if the sensor said nothing."""

    value: float | None
    unit: str = ""

    @property
    def known(self) -> bool:
        return self.value is not None

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return in_words(self.value) + (f" {self.unit}" if self.unit else "")


def in_words(value: float) -> str:
    """A number as people write it: never in scientific form."""
    if not math.isfinite(value) or abs(value) >= 10**DIGITS:
        return f"{value:.0f}"
    words = f"{Decimal(f'{value:.{DIGITS}g}'):f}"
    return "0" if words == "-0" else words


class Source:
    """A sensor that is open. A kind of sensor is a subclass, made from its settings and the kernel's folder.

    It may raise anything, and hang: the reading is then unknown.
    """

    unit = ""
    """The unit of its values, if the settings name none."""

    def value(self) -> float:
        """What it measures now."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what it holds."""
