"""Prompts as Jinja templates over what the device knows, checked when the configuration is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2

from device.sensors.reading import Reading
from flashd.errors import ConfigError, UsageError
from flashd.system.template import Template, TemplateFails

NO_SENSOR = re.compile(r"has no attribute '(\w+)'")
VALUES = ("sensors", "now", "last", "choice", "distance", "heard")
"""What a template may name: readings by sensor, the time, the last answer, a menu's choice, metres, speech."""

MAX_LENGTH = 64 << 10
"""Characters that a template may make."""


class Prompt:
    """One template.

    Raises ConfigError if it is not a template, names what is not there, or a sensor that is not configured.
    """

    def __init__(self, source: str, trigger: str, sensors: list[str]) -> None:
        self._trigger = trigger
        self._template = Template(source, MAX_LENGTH, {"undefined": jinja2.StrictUndefined})
        try:
            unknown = self._template.names() - set(VALUES)
        except TemplateFails as error:
            raise ConfigError(f"it is not a Jinja template: {error}") from error
        if unknown:
            raise ConfigError(f"it names {min(unknown)!r}; there are {', '.join(VALUES)}")
        try:
            self._render({name: Reading(None) for name in sensors}, "", {})
        except TemplateFails as error:
            missing = NO_SENSOR.search(str(error))
            if missing:
                there = f"there are {', '.join(sensors)}" if sensors else "there are none"
                raise ConfigError(f"no sensor is called {missing.group(1)!r}; {there}") from error
            raise ConfigError(f"the template fails: {error}") from error

    def render(self, sensors: Mapping[str, Reading], last: str, values: Mapping[str, Any]) -> str:
        """The prompt now. Raises UsageError if the template fails."""
        try:
            return self._render(sensors, last, values)
        except TemplateFails as error:
            raise UsageError(f"trigger {self._trigger!r}: its prompt fails: {error}") from error

    def _render(self, sensors: Mapping[str, Reading], last: str, values: Mapping[str, Any]) -> str:
        names = {
            "sensors": dict(sensors), "now": datetime.now(), "last": last, "choice": "", "distance": 0.0, "heard": "",
        }  # fmt: skip
        return self._template.render({**names, **values})
