"""Every kind of sensor: its settings, and the class that reads it. A new kind is one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from device.sensors.iio import IioChannel
from device.sensors.on_pins import AnalogChannel, Brightness
from device.sensors.one_wire import Thermometer
from device.sensors.ranger import Ranger
from device.sensors.reading import Source
from flashd.config.devices import Analog, Distance, Iio, Light, OneWire, Sensor

KINDS: dict[type[Sensor], Callable[[Any, Path], Source]] = {
    Distance: Ranger,
    Light: Brightness,
    Analog: AnalogChannel,
    OneWire: Thermometer,
    Iio: IioChannel,
}
"""Each is called with the settings and the folder in which the kernel shows its devices, /sys."""
