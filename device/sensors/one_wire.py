"""Thermometers on the 1-Wire bus, which the kernel shows as files.

https://docs.kernel.org/w1/slaves/w1_therm.html
"""

from __future__ import annotations

from pathlib import Path

from device.sensors.reading import Source
from flashd.config.devices import OneWire
from flashd.config.fields import ONE_WIRE_FAMILIES

POWER_ON, POWER_ON_BYTE = 85.0, 0x0C
"""What the chip says that has not measured since it was given power: 85 °C, with 0x0C as byte 6 of its scratchpad. A
true 85 °C has 0x10 there."""


class Thermometer(Source):
    """A DS18B20 or one of its kin, in degrees Celsius."""

    def __init__(self, settings: OneWire, sysfs: Path) -> None:
        self._bus, self._id = sysfs / "bus/w1/devices", settings.id

    def value(self) -> float:
        """Raises OSError if it is not there, ValueError if it did not measure."""
        patterns = [self._id] if self._id else [f"{family}-*" for family in ONE_WIRE_FAMILIES]
        found = [device for pattern in patterns for device in sorted(self._bus.glob(pattern))]
        if not found:
            raise FileNotFoundError(f"no {self._id or 'thermometer'} on the 1-Wire bus")
        # w1_slave shows the checksum and the chip's bytes, which `temperature` hides
        return celsius((found[0] / "w1_slave").read_text("ascii"))


def celsius(text: str) -> float:
    """The temperature in what the kernel says of a chip: its bytes, `crc=.. YES`, and `t=` in thousandths."""
    if "YES" not in text or "t=" not in text:
        raise ValueError("a wrong checksum on the 1-Wire bus")
    scratchpad = bytes.fromhex(text.partition(":")[0])
    if not any(scratchpad):
        raise ValueError("the thermometer says nothing but zeros; is its data line shorted to ground?")
    degrees = int(text.rpartition("t=")[2]) / 1000
    if degrees == POWER_ON and scratchpad[6] == POWER_ON_BYTE:
        raise ValueError("the thermometer lost its power and has not measured since")
    return degrees
