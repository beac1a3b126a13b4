"""Sensors: read side by side, each with a time-out, so that a missing one is unknown and holds nothing up.

gpiozero reads what hangs on pins, through whichever pin factory is set. 1-Wire and IIO are files of the kernel
under `sysfs`, which tests set to a folder of their own.
https://docs.kernel.org/w1/slaves/w1_therm.html, https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-bus-iio
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import gpiozero

from flashd.config.devices import Analog, AnySensor, Distance, Iio, Light, OneWire

log = logging.getLogger(__name__)

POWER_ON = 85.0
"""What a DS18B20 says that has lost its power and has not measured since: no measurement."""

IIO_UNITS: dict[str, tuple[float, str]] = {
    "temp": (0.001, "°C"), "humidityrelative": (0.001, "%"), "pressure": (10.0, "hPa"),
    "illuminance": (1.0, "lux"), "voltage": (0.001, "V"), "current": (0.001, "A"), "concentration": (1.0, "%"),
}  # fmt: skip
"""From the ABI's unit of a kind of channel to a person's."""

MCP3008_FULL = 1023
"""What its ten bits say at full scale."""

ECHO_SECONDS = 1.0
"""How old the last echo of a ranger may be; it sends a ping every 0.06 s."""


@dataclass(frozen=True)
class Reading:
    """What a sensor said, in words `unknown` where it said nothing."""

    value: float | None
    unit: str = ""

    @property
    def known(self) -> bool:
        return self.value is not None

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return f"{self.value:.4g}" + (f" {self.unit}" if self.unit else "")


class Sensors:
    """The configured sensors. Close them."""

    def __init__(self, settings: list[AnySensor], sysfs: Path = Path("/sys")) -> None:
        self._sensors = {s.name: _Sensor(s, sysfs) for s in settings}

    def close(self) -> None:
        for sensor in self._sensors.values():
            sensor.close()

    def read(self) -> dict[str, Reading]:
        """A reading of each, all taken at once."""
        for sensor in self._sensors.values():
            sensor.ask()
        return {name: sensor.answer() for name, sensor in self._sensors.items()}

    def read_one(self, name: str) -> Reading:
        """Raises KeyError."""
        self._sensors[name].ask()
        return self._sensors[name].answer()


class _Sensor:
    """One sensor and the thread that may hang in it."""

    def __init__(self, settings: AnySensor, sysfs: Path) -> None:
        self._settings, self._sysfs = settings, sysfs
        self._device: gpiozero.Device | None = None
        self._source: Callable[[], float] | None = None
        self._unit = settings.unit
        self._wishes: SimpleQueue[bool] = SimpleQueue()
        self._read = threading.Condition()
        self._busy = self._hangs = False
        self._asked = 0.0
        self._value: float | None = None
        self._said_missing = False
        threading.Thread(target=self._run, name=f"sensor {settings.name}", daemon=True).start()

    def close(self) -> None:
        self._wishes.put(False)
        if self._device is not None:
            self._device.close()

    def ask(self) -> None:
        now = time.monotonic()
        with self._read:
            self._hangs = self._busy and now - self._asked > self._settings.timeout
            if not self._busy:
                self._busy, self._asked = True, now
                self._wishes.put(True)

    def answer(self) -> Reading:
        """What came of `ask`, waiting no longer than the sensor's time-out, and for one that hangs not again."""
        until = time.monotonic() + self._settings.timeout
        with self._read:
            while self._busy:
                left = until - time.monotonic()
                if self._hangs or left <= 0:
                    self._say_missing("no answer in time")
                    return Reading(None, self._unit)
                self._read.wait(left)
            return Reading(self._value, self._unit)

    def _run(self) -> None:
        while self._wishes.get():
            value: float | None = None
            try:
                if self._source is None:
                    self._source = self._open()
                value = float(self._source())
                self._said_missing = False
            except Exception as error:  # noqa: BLE001 - drivers raise what they like; the reading is then unknown
                self._say_missing(f"{type(error).__name__}: {error}")
            with self._read:
                self._value, self._busy = value, False
                self._read.notify_all()

    def _say_missing(self, why: str) -> None:
        if not self._said_missing:
            log.warning("sensor %s is unknown: %s", self._settings.name, why)
        self._said_missing = True

    def _open(self) -> Callable[[], float]:
        s = self._settings
        if isinstance(s, Distance):
            ranger = Ranger(echo=s.echo, trigger=s.trigger, max_distance=s.range)
            self._device = ranger
            return ranger.metres
        if isinstance(s, Light):
            light = gpiozero.LightSensor(s.pin)
            self._device = light
            return lambda: light.value
        if isinstance(s, Analog):
            analog = gpiozero.MCP3008(channel=s.channel)
            self._device = analog
            low, high = s.low, s.high
            # not gpiozero's `value`, which for 0 is a little more
            return lambda: low + analog.raw_value * (high - low) / MCP3008_FULL
        if isinstance(s, OneWire):
            one = s
            return lambda: one_wire(self._sysfs, one.id)
        return self._open_iio(s)

    def _open_iio(self, s: Iio) -> Callable[[], float]:
        factor, unit = IIO_UNITS.get(s.channel.rstrip("0123456789"), (1.0, ""))
        self._unit = self._unit or unit
        return lambda: factor * iio(self._sysfs, s.device, s.channel)


class Ranger(gpiozero.DistanceSensor):  # type: ignore[misc]
    """gpiozero's ranger, which goes on giving its last distances when it is pulled; this one then says so."""

    heard = 0.0
    """When the last echo came, by the monotonic clock."""

    def _read(self) -> float | None:
        value: float | None = super()._read()
        if value is not None:
            self.heard = time.monotonic()
        return value

    def metres(self) -> float:
        """The distance, waiting for the first echoes. Raises OSError where none comes any more."""
        distance = float(self.distance)
        if time.monotonic() - self.heard > ECHO_SECONDS:
            raise OSError("no echo")
        return distance


def one_wire(sysfs: Path, number: str | None) -> float:
    """Degrees Celsius of a DS18B20. Raises OSError where it is not there, ValueError where it did not measure."""
    devices = sorted((sysfs / "bus/w1/devices").glob(number or "28-*"))
    if not devices:
        raise FileNotFoundError(f"no {number or 'DS18B20'} on the 1-Wire bus")
    # w1_slave carries the checksum that `temperature` hides
    text = (devices[0] / "w1_slave").read_text("ascii")
    if "YES" not in text or "t=" not in text:
        raise ValueError("a wrong checksum on the 1-Wire bus")
    celsius = int(text.rpartition("t=")[2]) / 1000
    if celsius == POWER_ON:
        raise ValueError("the thermometer has lost its power")
    return celsius


def iio(sysfs: Path, device: str, channel: str) -> float:
    """A channel of the IIO device of a name, in the ABI's unit. Raises OSError where it is not there."""
    folder = next(
        (d for d in sorted((sysfs / "bus/iio/devices").glob("iio:device*")) if _text(d / "name") == device), None
    )
    if folder is None:
        raise FileNotFoundError(f"no IIO device is called {device!r}")
    whole = folder / f"in_{channel}_input"
    if whole.exists():
        return float(_text(whole))
    raw = float(_text(folder / f"in_{channel}_raw"))
    return (raw + _part(folder, channel, "offset", 0.0)) * _part(folder, channel, "scale", 1.0)


def _part(folder: Path, channel: str, name: str, default: float) -> float:
    """A channel's own attribute, or the one that its kind shares."""
    for stem in (channel, channel.rstrip("0123456789")):
        if (folder / f"in_{stem}_{name}").exists():
            return float(_text(folder / f"in_{stem}_{name}"))
    return default


def _text(path: Path) -> str:
    return path.read_text("ascii").strip()
