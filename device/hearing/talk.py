"""What has somebody heard: a button that is held or tapped, and wake words."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import gpiozero

from device.hearing.ears import Ears, Press
from device.hearing.recogniser import NotHeard
from flashd.config.devices import Talk

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long a close waits for what is heard at the moment."""

LOOK_SECONDS = 0.1
"""How often it looks whether wake words may be waited for."""

AGAIN_SECONDS = 10.0
"""After so long a microphone or a listener that failed is tried again."""


class PushToTalk:
    """A talk trigger's button, and a thread that hears and then fires.

    Args:
        pin: the button's.
        pressed: is told of each press before anything is recorded, in that thread.
        fire: is given what was heard.
    """

    def __init__(
        self, trigger: Talk, pin: int, ears: Ears, pressed: Callable[[], None], fire: Callable[[str], None]
    ) -> None:
        self._ears, self._pressed, self._fire, self._taps = ears, pressed, fire, trigger.tap
        self._presses: SimpleQueue[Press | None] = SimpleQueue()
        self._latest: Press | None = None
        self._tapped: Press | None = None
        self._button = gpiozero.Button(pin, pull_up=trigger.pull_up, bounce_time=trigger.bounce or None)
        self._thread = threading.Thread(target=self._run, name=f"trigger {trigger.name}", daemon=True)
        self._thread.start()
        self._button.when_pressed = self._down
        self._button.when_released = self._up

    def close(self) -> None:
        self._button.close()
        self._latest = None
        self._presses.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _down(self) -> None:
        tapped = self._tapped
        if tapped is not None and tapped.is_tap and not tapped.is_over:
            tapped.end()
            return
        self._latest = Press(self._taps)
        self._presses.put(self._latest)

    def _up(self) -> None:
        if self._latest is not None:
            self._latest.let_go()

    def _run(self) -> None:
        while (press := self._presses.get()) is not None:
            self._tapped = press
            try:
                self._pressed()
                heard = self._ears.hear(press, lambda press=press: press is self._latest)  # type: ignore[misc]
            except Exception:
                log.exception("talk")
                continue
            finally:
                self._tapped = None
            if heard:
                self._fire(heard)


class WakeWords:
    """The wake words of all talk triggers, and a thread that waits for them, hears, and then fires.

    Args:
        triggers: those that have wake words.
        spotted: is told whose word came, at once, in that thread.
        fire: is given whose word came, and what was heard after it.
    """

    def __init__(
        self, triggers: Sequence[Talk], ears: Ears, spotted: Callable[[str], None], fire: Callable[[str, str], None]
    ) -> None:
        self._names = {word: trigger.name for trigger in triggers for word in trigger.wake or ()}
        self._ears, self._spotted, self._fire = ears, spotted, fire
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wake words", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        pause = 0.0
        while not self._closing.wait(pause):
            pause = LOOK_SECONDS
            try:
                if self._ears.may_wait:
                    self._hear()
            except NotHeard as error:
                self._ears.cannot_wait(error)
                pause = AGAIN_SECONDS
            except Exception:
                log.exception("wake words")
                pause = AGAIN_SECONDS

    def _hear(self) -> None:
        heard = self._ears.hear_after_word(
            lambda word: self._spotted(self._names[word]), lambda: not self._closing.is_set()
        )
        if heard is not None and heard[1]:
            self._fire(self._names[heard[0]], heard[1])
