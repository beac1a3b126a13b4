"""The button that somebody must press before some calls are made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import gpiozero

from device.tools.course import Course, NotDone
from flashd.config.tools import Confirm

LOOK_SECONDS = 0.2
"""How often it is looked whether the call is still wanted."""


class Confirmation:
    """The button, if the configuration has one. Close it.

    `asks` is told the sentence that asks for a press, and None when nothing is asked for any longer.

    Raises gpiozero.GPIOZeroError if the pin cannot be had.
    """

    def __init__(self, settings: Confirm | None, asks: Callable[[str | None], None]) -> None:
        self._settings, self._asks = settings, asks
        self._asking, self._pressed, self._closed = threading.Lock(), threading.Event(), False
        self._button: gpiozero.Button | None = None
        if settings is not None:
            self._button = gpiozero.Button(
                settings.pin, pull_up=settings.pull_up, bounce_time=settings.bounce or None
            )
            self._button.when_pressed = self._pressed.set

    def close(self) -> None:
        self._closed = True
        if self._button is not None:
            self._button.close()

    def ask(self, what: str, course: Course) -> None:
        """Waits for a press that begins now, before something is done: "switch the pump on". Raises NotDone."""
        if self._settings is None:
            raise NotDone("somebody must confirm it, and the board has no button for that")
        if not self._asking.acquire(blocking=False):
            raise NotDone("the button that confirms it is waited for already, for something else")
        wait = self._settings.wait
        words = f"Press the button within {wait:g} s to have it {what}."
        try:
            self._pressed.clear()
            course.tell(words)
            self._asks(words)
            until = time.monotonic() + wait
            while not self._pressed.wait(min(LOOK_SECONDS, max(0.0, until - time.monotonic()))):
                if self._closed or not course.wanted():
                    raise NotDone("it was stopped before anybody confirmed it")
                if time.monotonic() >= until:
                    raise NotDone(f"nobody confirmed it within {wait:g} s")
        finally:
            self._asking.release()
            self._asks(None)
