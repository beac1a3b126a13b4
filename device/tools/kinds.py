"""Every kind of tool: its settings, and the class that does it. A new kind is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from device.tools.looking import Clock, Look
from device.tools.program import Run
from device.tools.switching import Switch
from device.tools.tool import Reach, Tool
from flashd.config.tools import BoardTool, ReadSensor, RunProgram, SetOutput, TellTime

KINDS: dict[type[BoardTool], Callable[[Any, Reach], Tool]] = {
    TellTime: Clock,
    ReadSensor: Look,
    SetOutput: Switch,
    RunProgram: Run,
}
"""Each is called with the settings and with what a tool may look at and use."""
