"""Sensors: read side by side, each with a time-out, so that a missing one is unknown and holds nothing up.

gpiozero reads what hangs on pins, through whichever pin factory is set. 1-Wire and IIO are files of the kernel
under `sysfs`, which tests set to a folder of their own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path
from queue import SimpleQueue

from device.sensors.kinds import KINDS
from device.sensors.reading import Reading, Source
from flashd.config.devices import AnySensor

log = logging.getLogger(__name__)


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
        self._source: Source | None = None
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
        if self._source is not None:
            self._source.close()

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
                value = self._measure()
                self._said_missing = False
            except Exception as error:  # noqa: BLE001 - drivers raise what they like; the reading is then unknown
                self._say_missing(f"{type(error).__name__}: {error}")
            with self._read:
                self._value, self._busy = value, False
                self._read.notify_all()

    def _measure(self) -> float:
        if self._source is None:
            self._source = KINDS[type(self._settings)](self._settings, self._sysfs)
            self._unit = self._unit or self._source.unit
        value = float(self._source.value())
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a measurement")
        return value

    def _say_missing(self, why: str) -> None:
        if not self._said_missing:
            log.warning("sensor %s is unknown: %s", self._settings.name, why)
        self._said_missing = True
