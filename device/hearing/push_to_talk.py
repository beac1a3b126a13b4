"""Push to talk: while a button is held, what is said is recorded; then it is understood and asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from queue import SimpleQueue

import gpiozero

from device.hearing.kinds import KINDS
from device.hearing.microphone import Microphone, is_silent, seconds
from device.hearing.recogniser import NotHeard, NothingSaid, wav, words
from flashd.config.devices import Talk
from flashd.config.hearing import Hearing

log = logging.getLogger(__name__)

LEAST_SECONDS = 0.3
"""A press that is shorter says nothing: it only stops what is being said."""


CLOSE_SECONDS = 5.0
"""How long a close waits for what is heard at the moment."""


class Stage(StrEnum):
    """How far it is with hearing."""

    LISTENING = "listening"
    UNDERSTANDING = "understanding"
    OVER = "over"
    FAILED = "failed"


class Press:
    """One press of a button, which may still be held."""

    def __init__(self) -> None:
        self._down = time.monotonic()
        self._up: float | None = None

    def let_go(self) -> None:
        self._up = time.monotonic()

    @property
    def held(self) -> bool:
        return self._up is None

    @property
    def seconds(self) -> float:
        """How long it was held, or is held by now."""
        return (time.monotonic() if self._up is None else self._up) - self._down


Tell = Callable[[Stage, str], None]
"""tell(stage, words): the words are for people to read. It must not wait."""


class Ears:
    """One microphone and one recogniser, which all talk triggers share: one is heard after the other.

    Args:
        hearing: their settings.
        tell: is told how far it is.
        may_listen: whether nobody has muted the appliance.
    """

    def __init__(self, hearing: Hearing, tell: Tell, may_listen: Callable[[], bool]) -> None:
        self._microphone = Microphone(hearing)
        self._recogniser = KINDS[type(hearing.recogniser)](hearing.recogniser, hearing)
        self._tell, self._may_listen = tell, may_listen
        self._turn = threading.Lock()
        self._said: set[str] = set()

    def hear(self, press: Press, wanted: Callable[[], bool]) -> str:
        """What is said during a press. It is empty if nothing was understood; people have then been told why."""
        with self._turn:
            try:
                heard = self._understood(press, lambda: wanted() and self._may_listen())
            except NotHeard as error:
                self._complain(error)
                self._tell(Stage.OVER if isinstance(error, NothingSaid) else Stage.FAILED, str(error))
                return ""
            self._tell(Stage.OVER, f"heard: {heard}" if heard else "")
            return heard

    def close(self) -> None:
        self._recogniser.close()

    def _understood(self, press: Press, wanted: Callable[[], bool]) -> str:
        if not wanted() or not press.held:
            return ""
        self._tell(Stage.LISTENING, "")
        samples = self._microphone.record(lambda: press.held, wanted)
        if not wanted() or (not press.held and press.seconds < LEAST_SECONDS):
            return ""
        if is_silent(samples):
            raise NotHeard("the microphone gives silence; alsamixer shows whether it is switched off")
        self._tell(Stage.UNDERSTANDING, "")
        text = words(self._recogniser.recognise(wav(samples), wanted))
        if not wanted():
            return ""
        if not text:
            raise NothingSaid(f"nothing was understood in {seconds(samples):.1f} s of sound")
        return text

    def _complain(self, error: NotHeard) -> None:
        """Says in the journal what is wrong, each thing once: it would come with every press."""
        if isinstance(error, NothingSaid):
            log.info("talk: %s", error)
        elif str(error) not in self._said:
            log.warning("talk: %s; flashd doctor looks at the microphone", error)
            self._said.add(str(error))


class PushToTalk:
    """A talk trigger: a button, and a thread that hears and then fires.

    Args:
        pressed: is told of each press before anything is recorded, in that thread.
        fire: is given what was heard.
    """

    def __init__(self, trigger: Talk, ears: Ears, pressed: Callable[[], None], fire: Callable[[str], None]) -> None:
        self._ears, self._pressed, self._fire = ears, pressed, fire
        self._presses: SimpleQueue[Press | None] = SimpleQueue()
        self._latest: Press | None = None
        self._button = gpiozero.Button(trigger.pin, pull_up=trigger.pull_up, bounce_time=trigger.bounce or None)
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
        self._latest = Press()
        self._presses.put(self._latest)

    def _up(self) -> None:
        if self._latest is not None:
            self._latest.let_go()

    def _run(self) -> None:
        while (press := self._presses.get()) is not None:
            try:
                self._pressed()
                heard = self._ears.hear(press, lambda press=press: press is self._latest)  # type: ignore[misc]
            except Exception:
                log.exception("talk")
                continue
            if heard:
                self._fire(heard)
