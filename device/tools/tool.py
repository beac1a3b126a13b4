"""What every kind of tool offers, what it may look at, and what comes of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from device.drives import Drives
from device.sensors.sensors import Sensors

Wanted = Callable[[], bool]
"""Whether a call is still wanted: its job was not cancelled, and flashd does not stop."""


@dataclass(frozen=True)
class Done:
    """What came of a call."""

    result: str  # as the model is told
    words: str  # as people are told: a sentence


class NotDone(Exception):
    """A call was not made. The text says why, in half a sentence for the model and for people."""


@dataclass(frozen=True)
class Reach:
    """What a tool may look at and use."""

    sensors: Sensors
    drives: Drives


class Tool:
    """A tool that is open. A kind of tool is a subclass, made from its settings and its reach.

    Whoever adds one bounds it: a call may take some seconds, and its result some hundred characters.
    """

    def do(self, arguments: Mapping[str, Any], wanted: Wanted) -> Done:
        """Makes a call, as long as it is `wanted`. Raises NotDone; anything else that is raised is a failure.

        The arguments follow the settings' schema if the call was made with these settings. A call may be older, so
        they are looked at again.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what it holds."""
