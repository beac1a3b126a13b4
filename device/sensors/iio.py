"""Channels of Linux IIO devices, which the kernel shows as files.

https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-bus-iio
"""

from __future__ import annotations

import re
from pathlib import Path

from device.sensors.reading import Source
from flashd.config.devices import Iio

UNITS: dict[str, tuple[float, str]] = {
    "temp": (0.001, "°C"), "humidityrelative": (0.001, "%"), "pressure": (10.0, "hPa"),
    "illuminance": (1.0, "lux"), "voltage": (0.001, "V"), "current": (0.001, "A"), "power": (0.001, "W"),
    "energy": (1.0, "J"), "concentration": (1.0, "%"), "massconcentration": (1.0, "µg/m³"),
    "distance": (1.0, "m"), "velocity": (1.0, "m/s"), "accel": (1.0, "m/s²"), "anglvel": (1.0, "rad/s"),
    "angl": (1.0, "rad"), "incli": (1.0, "°"), "magn": (1.0, "G"), "resistance": (1.0, "Ω"),
    "capacitance": (1.0, "nF"), "electricalconductivity": (1.0, "S/m"), "colortemp": (1.0, "K"),
}  # fmt: skip
"""From the kernel's unit of a kind of channel to a person's."""

CHANNEL = re.compile(r"(?P<kind>[a-z]+)(?P<number>[0-9]*)(?P<modifier>\w*)")
"""temp, voltage0, temp_object, intensity0_ir."""


class IioChannel(Source):
    """A channel of the device of a name. The device may come and go."""

    def __init__(self, settings: Iio, sysfs: Path) -> None:
        self._devices, self._settings = sysfs / "bus/iio/devices", settings
        self._factor, self.unit = UNITS.get(_kind(settings.channel), (1.0, ""))

    def value(self) -> float:
        """Raises OSError if it is not there."""
        return self._factor * measured(self._folder(), self._settings.channel)

    def _folder(self) -> Path:
        for folder in sorted(self._devices.glob("iio:device*")):
            if _text(folder / "name") == self._settings.device:
                return folder
        raise FileNotFoundError(f"no IIO device is called {self._settings.device!r}")


def measured(folder: Path, channel: str) -> float:
    """What a channel measures, in the kernel's unit."""
    whole = folder / f"in_{channel}_input"
    if whole.exists():
        return float(_text(whole))
    raw = float(_text(folder / f"in_{channel}_raw"))
    return (raw + _shared(folder, channel, "offset", 0.0)) * _shared(folder, channel, "scale", 1.0)


def _shared(folder: Path, channel: str, name: str, default: float) -> float:
    """A channel's own attribute, or the one that it shares: with its modifier's, its kind's, or all channels."""
    parts = CHANNEL.fullmatch(channel)
    stems = [channel]
    if parts is not None:
        stems += [parts["kind"] + parts["number"], parts["kind"] + parts["modifier"], parts["kind"]]
    for path in (*(folder / f"in_{stem}_{name}" for stem in stems), folder / f"in_{name}"):
        if path.exists():
            return float(_text(path))
    return default


def _kind(channel: str) -> str:
    parts = CHANNEL.fullmatch(channel)
    return parts["kind"] if parts else ""


def _text(path: Path) -> str:
    return path.read_text("ascii").strip()
