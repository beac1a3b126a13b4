"""What hangs on the board's pins, read through gpiozero: a light sensor, and the channels of an MCP3008."""

from __future__ import annotations

import threading
from pathlib import Path

import gpiozero

from device.sensors.reading import Source
from flashd.config.devices import Analog, Light

MCP3008_FULL = 1023
"""What its ten bits say at full scale."""

_OPENING = threading.Lock()
"""gpiozero finds out that channels share a chip only if they are opened one after the other. Each sensor opens its
own in a thread of its own."""


class Brightness(Source):
    """A light-dependent resistor."""

    def __init__(self, settings: Light, _: Path) -> None:
        self._light = gpiozero.LightSensor(settings.pin)

    def value(self) -> float:
        return float(self._light.value)

    def close(self) -> None:
        self._light.close()


class AnalogChannel(Source):
    """A channel of an MCP3008, scaled as the settings say."""

    def __init__(self, settings: Analog, _: Path) -> None:
        with _OPENING:
            self._channel = gpiozero.MCP3008(channel=settings.channel)
        self._low, self._high = settings.low, settings.high

    def value(self) -> float:
        # not gpiozero's `value`, which for 0 is a little more
        return self._low + float(self._channel.raw_value) * (self._high - self._low) / MCP3008_FULL

    def close(self) -> None:
        self._channel.close()
