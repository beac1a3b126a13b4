"""The tool that sets an output: for a while, never longer than allowed, and not again at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device.sensors.reading import in_words
from device.tools.course import Course, Done, NotDone
from device.tools.tool import Reach, Tool
from flashd.config.tools import SetOutput


@dataclass(frozen=True)
class _Wish:
    """What a call wants."""

    value: str
    share: float
    seconds: float


class Switch(Tool):
    """An output pin.

    A call while it is on may change it and does not lengthen what is allowed in all. After that it rests, so that
    calls which follow one another cannot keep it on.
    """

    def __init__(self, settings: SetOutput, reach: Reach) -> None:
        self._settings, self._line = settings, reach.drives.of_tool(settings.name)
        self._confirmation = reach.confirmation
        self._lock = threading.Lock()
        self._since = self._until = 0.0  # when it was turned on, and when it goes or went off

    def do(self, arguments: Mapping[str, Any], course: Course) -> Done:
        wish = self._wish(arguments)
        if self._settings.confirm and wish.share:
            with self._lock:
                seconds = self._allowed(wish, time.monotonic())  # nobody is asked for what is not to be done
            self._confirmation.ask(self._words(_for(wish.value, seconds)), course)
        with self._lock:
            return self._set(wish, time.monotonic())

    def _wish(self, arguments: Mapping[str, Any]) -> _Wish:
        """Raises NotDone if that is not allowed."""
        s, value, seconds = self._settings, arguments.get("value"), arguments.get("seconds", self._settings.most)
        if value not in s.values:
            raise NotDone(f"allowed are {', '.join(s.values)}")
        if type(seconds) is not int or not 1 <= seconds <= s.most:
            raise NotDone(f"allowed are 1 to {s.most} whole seconds")
        return _Wish(value, s.values[value], seconds)

    def _set(self, wish: _Wish, now: float) -> Done:
        if not wish.share:
            self._until = min(self._until, now)
            self._line.turn(0, 0)
            return Done(wish.value, f"It {self._words(wish.value, past=True)}.")
        seconds = self._allowed(wish, now)
        if now >= self._until:
            self._since = now
        self._until = now + seconds
        self._line.turn(wish.share, seconds)
        result = _for(wish.value, seconds)
        return Done(result, f"It {self._words(result, past=True)}.")

    def _allowed(self, wish: _Wish, now: float) -> float:
        """The seconds for which it may be on from now. Raises NotDone if it may not be."""
        if now < self._until:
            return min(wish.seconds, self._since + self._settings.most - now)
        rest = self._until - self._since if self._settings.rest is None else self._settings.rest
        left = self._until + rest - now if self._until > self._since else 0.0
        if left > 0:
            raise NotDone(f"it was on a moment ago and stays off for {left:.0f} s more")
        return wish.seconds

    def _words(self, result: str, past: bool = False) -> str:
        what = f"the {self._settings.name.replace('_', ' ')}"
        if result.split()[0] in ("on", "off"):
            return f"{'switched' if past else 'switch'} {what} {result}"
        return f"set {what} to {result}"


def _for(value: str, seconds: float) -> str:
    return f"{value} for {in_words(round(seconds, 1))} s"
