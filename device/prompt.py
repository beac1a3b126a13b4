"""Prompts as Jinja templates over what the device knows, checked when the configuration is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2

from device.sensors import Reading
from flashd.errors import ConfigError, UsageError
from flashd.system.template import Template, TemplateFails

NO_SENSOR = re.compile(r"has no attribute '(\w+)'")
VALUES = ("sensors", "now", "last", "choice", "distance")
"""What a template may name: readings by sensor, the time, the last answer, a menu's choice, metres."""

MAX_LENGTH = 64 << 10
"""Characters that a template may make."""


class Prompt:
    """One template.

    Raises ConfigError where it is no template, names what is not there, or a sensor that is not configured.
    """

    def __init__(self, source: str, trigger: str, sensors: list[str]) -> None:
        self._trigger = trigger
        self._template = Template(source, MAX_LENGTH, {"undefined": jinja2.StrictUndefined})
        try:
            unknown = self._template.names() - set(VALUES)
        except TemplateFails as error:
            raise ConfigError(f"trigger {trigger!r}: the prompt is no template: {error}") from error
        if unknown:
            raise ConfigError(
                f"trigger {trigger!r}: the prompt names {min(unknown)!r}; there are {', '.join(VALUES)}"
            )
        try:
            self.render({name: Reading(None) for name in sensors}, "", {})
        except UsageError as error:
            missing = NO_SENSOR.search(str(error))
            if missing:
                there = f"there are {', '.join(sensors)}" if sensors else "there are none"
                raise ConfigError(
                    f"trigger {trigger!r}: no sensor is called {missing.group(1)!r}; {there}"
                ) from error
            raise ConfigError(str(error)) from error

    def render(self, sensors: Mapping[str, Reading], last: str, values: Mapping[str, Any]) -> str:
        """The prompt now. Raises UsageError where the template fails."""
        names = {"sensors": dict(sensors), "now": datetime.now(), "last": last, "choice": "", "distance": 0.0}
        try:
            return self._template.render({**names, **values})
        except TemplateFails as error:
            raise UsageError(f"trigger {self._trigger!r}: the prompt fails: {error}") from error
