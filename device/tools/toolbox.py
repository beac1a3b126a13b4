"""The configured tools, open: nothing else is ever done, whatever a model says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from device.tools.course import Course, Done, NotDone
from device.tools.kinds import KINDS
from device.tools.tool import Reach, Tool
from flashd.config.settings import Settings
from flashd.config.tools import LONGEST, AnyTool
from flashd.daemon.job import API, Call, Calling
from flashd.daemon.job import Tool as Described
from flashd.daemon.limits import Rates
from flashd.errors import NOT_JSON
from flashd.system.printable import printable

log = logging.getLogger(__name__)

MOST = LONGEST + 100
"""Characters of a result, with what flashd says of it."""


def calling(tools: Sequence[AnyTool], names: Sequence[str]) -> Calling | None:
    """What the model is told of the tools of these names. None if there are none."""
    told = tuple(
        Described(name=tool.name, description=tool.description, parameters=tool.parameters)
        for tool in tools
        if tool.name in names
    )
    return Calling(tools=told) if told else None


class Toolbox:
    """The tools of a configuration. Close it. Calls come from several threads."""

    def __init__(self, settings: Settings, reach: Reach) -> None:
        self._settings = {tool.name: tool for tool in settings.tools}
        self._allowed = {f"trigger:{trigger.name}": trigger.tools for trigger in settings.triggers}
        self._allowed |= {f"serial:{line.name}": line.tools for line in settings.serial} | {API: settings.kiosk.tools}
        self._kiosk = settings.kiosk
        self._lock, self._rates = threading.Lock(), Rates()
        self._tools: dict[str, Tool] = {}
        try:
            for tool in settings.tools:
                self._tools[tool.name] = KINDS[type(tool)](tool, reach)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for tool in self._tools.values():
            tool.close()

    def call(self, source: str, call: Call, course: Course, asked: str = "") -> Done:
        """Makes a call for whoever asked, a job's `source`, if the configuration allows it. It raises nothing.

        `asked`: the words, which may be those of a preset with tools of its own.
        """
        try:
            done = self._called(source, call, course, asked)
        except NotDone as error:
            done = Done(f"Not done: {error}.", f"It did not do “{_called(call)}”: {error}.")
        except Exception as error:
            log.exception("tool %s", call.name)
            done = Done("It failed.", f"“{_called(call)}” failed: {type(error).__name__}.")
        log.info("tool %s: %s", call.name, done.words)
        return Done(printable(done.result)[:MOST], printable(done.words)[:MOST])

    def _called(self, source: str, call: Call, course: Course, asked: str) -> Done:
        tool, allowed = self._tools.get(call.name), self._allowed.get(source, ())
        if not source.startswith("trigger:") and (preset := self._kiosk.preset(asked)) is not None:
            allowed = preset.tools or ()
        if tool is None or call.name not in allowed:
            raise NotDone("you may not use a tool of this name")
        with self._lock:
            most = self._settings[call.name].per_minute
            if self._rates.full(call.name, most):
                raise NotDone(f"it was asked for more than {most} times within a minute")
            self._rates.note(call.name, most)
        return tool.do(_arguments(call), course)


def _arguments(call: Call) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(call.arguments, type=dict[str, Any])
    except NOT_JSON as error:
        raise NotDone("its arguments are not a JSON object") from error


def _called(call: Call) -> str:
    return call.name.replace("_", " ")
