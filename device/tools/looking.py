"""Tools that only look: at the clock, at sensors."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from device.tools.course import Course, Done, NotDone
from device.tools.tool import Reach, Tool
from flashd.config.tools import ReadSensor, TellTime


class Clock(Tool):
    """The day and the time."""

    def __init__(self, _: TellTime, __: Reach) -> None:
        """It holds nothing."""

    def do(self, arguments: Mapping[str, Any], course: Course) -> Done:
        now = f"{datetime.now():%A, %-d %B %Y, %H:%M}"
        return Done(now, f"It looked at the clock: {now}.")


class Look(Tool):
    """A reading of one of some sensors. A sensor that does not answer reads unknown, after its own timeout."""

    def __init__(self, settings: ReadSensor, reach: Reach) -> None:
        self._names, self._sensors = settings.sensors, reach.sensors

    def do(self, arguments: Mapping[str, Any], course: Course) -> Done:
        name = arguments.get("sensor")
        if name not in self._names:
            raise NotDone(f"no sensor has this name; the names are {', '.join(self._names)}")
        reading = self._sensors.read_one(name)
        return Done(str(reading), f"It looked at the {name.replace('_', ' ')}: {reading}.")
