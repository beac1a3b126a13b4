"""What every kind of tool offers, and what it may look at and use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device.drives import Drives
from device.sensors.sensors import Sensors
from device.tools.confirmation import Confirmation
from device.tools.course import Course, Done


@dataclass(frozen=True)
class Reach:
    """What a tool may look at and use."""

    sensors: Sensors
    drives: Drives
    confirmation: Confirmation


class Tool:
    """A tool that is open. A kind of tool is a subclass, made from its settings and its reach.

    Whoever adds one bounds it: a call may take some seconds, and its result some hundred characters.
    """

    def do(self, arguments: Mapping[str, Any], course: Course) -> Done:
        """Makes a call, as long as it is wanted. Raises NotDone; anything else that is raised is a failure.

        The arguments follow the settings' schema if the call was made with these settings. A call may be older, so
        they are looked at again.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what it holds."""
