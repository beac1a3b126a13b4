"""An ultrasonic ranger that says so when no echo comes any more."""

from __future__ import annotations

import time
from pathlib import Path

import gpiozero

from device.sensors.reading import Source
from flashd.config.devices import Distance

ECHO_SECONDS = 1.0
"""How old the last echo of a ranger may be; it sends a ping every 0.06 s."""


class Ranger(Source):
    """The distance in metres."""

    def __init__(self, settings: Distance, _: Path) -> None:
        self._pings = _Pings(echo=settings.echo, trigger=settings.trigger, max_distance=settings.range)

    def value(self) -> float:
        """Waits for the first echoes. Raises OSError if none comes any more."""
        distance = float(self._pings.distance)
        if time.monotonic() - self._pings.heard > ECHO_SECONDS:
            raise OSError("no echo")
        return distance

    def close(self) -> None:
        self._pings.close()


class _Pings(gpiozero.DistanceSensor):  # type: ignore[misc]
    """gpiozero's ranger, which goes on giving its last distances when it is unplugged; this one notes each echo."""

    heard = 0.0
    """When the last echo came, by the monotonic clock."""

    def _read(self) -> float | None:
        value: float | None = super()._read()
        if value is not None:
            self.heard = time.monotonic()
        return value
