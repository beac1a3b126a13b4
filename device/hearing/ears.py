"""What hears for triggers of kind talk: one microphone, one recogniser, and what listens for wake words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from enum import StrEnum

from device.hearing.kinds import KINDS
from device.hearing.listener import EndOfSpeech, Listener
from device.hearing.microphone import Microphone, is_silent, seconds
from device.hearing.recogniser import NotHeard, NothingSaid, wav, words
from device.hearing.tone import Tone
from flashd.config.hearing import RATE, SAMPLE_BYTES, Hearing

log = logging.getLogger(__name__)

LEAST_SECONDS = 0.3
"""A press that is shorter says nothing: it only stops what is being said."""

TAP_SECONDS = 0.5
"""Where a tap records too, a press that is shorter is a tap."""

TAIL_SECONDS = 0.3
"""So long is recorded on when the button is let go: people let go with the last word."""

LATE_SECONDS = 0.4
"""So long after its end a wake word is spotted at the latest. What is said next may have begun."""

SILENT_SECONDS = 5.0
"""A microphone that gives only silence for so long is switched off."""


class Stage(StrEnum):
    """How far it is with hearing."""

    LISTENING = "listening"
    UNDERSTANDING = "understanding"
    OVER = "over"
    FAILED = "failed"


class Press:
    """One press of a button, which may still be held.

    Args:
        taps: whether a short press is a tap, which records until speech ends.
    """

    def __init__(self, taps: bool = False) -> None:
        self._least = TAP_SECONDS if taps else LEAST_SECONDS
        self._taps = taps
        self._down = time.monotonic()
        self._up: float | None = None
        self._ended = False

    def let_go(self) -> None:
        if self._up is None:
            self._up = time.monotonic()

    def end(self) -> None:
        """Whoever tapped taps again: all is said."""
        self._ended = True

    @property
    def held(self) -> bool:
        return self._up is None

    @property
    def is_short(self) -> bool:
        return self._up is not None and self._up - self._down < self._least

    @property
    def is_tap(self) -> bool:
        return self._taps and self.is_short

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be recorded, as far as the button says."""
        if self._up is None:
            return False
        return self._ended if self.is_tap else time.monotonic() > self._up + TAIL_SECONDS


Tell = Callable[[Stage, str], None]
"""tell(stage, words): the words are for people to read. It must not wait."""

Wanted = Callable[[], bool]


class Ears:
    """What all talk triggers share: one is heard after the other, and a button goes before wake words.

    Args:
        hearing: the settings.
        wake: the wake words of all triggers.
        tell: is told how far it is.
        may_listen: whether nobody has muted the appliance.
    """

    def __init__(self, hearing: Hearing, wake: Sequence[str], tell: Tell, may_listen: Wanted) -> None:
        self._microphone, self._most = Microphone(hearing), hearing.recorded
        self._recogniser = KINDS[type(hearing.recogniser)](hearing.recogniser, hearing)
        self._listener = Listener(hearing.listener, wake) if hearing.listener else None
        self._tone = Tone(hearing.listener.tone) if hearing.listener and hearing.listener.tone else None
        self._tell, self._may_listen = tell, may_listen
        self._turn = threading.Lock()
        self._presses: set[Press] = set()
        self._said: set[str] = set()
        self._fails = False  # people were told that it cannot wait for wake words

    def hear(self, press: Press, wanted: Wanted) -> str:
        """What is said during a press. It is empty if nothing was understood; people have then been told why."""
        self._presses.add(press)
        try:
            with self._turn:
                go_on = self._while(wanted)
                if not go_on() or not (press.held or press.is_tap):
                    return ""
                return self._heard(lambda: self._pressed(press, go_on), go_on)
        finally:
            self._presses.discard(press)

    @property
    def may_wait(self) -> bool:
        """Whether wake words may be waited for now: nobody has muted it, and no button is pressed."""
        return self._may_listen() and not self._presses

    def hear_after_word(self, spotted: Callable[[str], None], wanted: Wanted) -> tuple[str, str] | None:
        """Waits for a wake word: that word, and what is said after it, which is empty if nothing was understood.

        None if it is not wanted any longer, or if it may wait no longer. Raises NotHeard if it cannot wait for words.

        Args:
            spotted: is told the word at once.
            wanted: whether to go on.
        """
        go_on = self._while(lambda: wanted() and not self._presses)
        with self._turn, closing(self._microphone.stream(go_on)) as pieces:
            found = self._word(pieces, go_on)
            if found is None:
                return None
            word, behind = found
            spotted(word)
            if self._tone is not None:
                self._tone.play()
            return word, self._heard(lambda: self._spoken(pieces, behind, go_on), go_on)

    def cannot_wait(self, error: NotHeard) -> None:
        """Wake words cannot be waited for. People are told too, each thing once; it is tried again and again."""
        if self._complain(error):
            self._fails = True
            self._tell(Stage.FAILED, str(error))

    def close(self) -> None:
        self._recogniser.close()
        if self._listener is not None:
            self._listener.close()

    # --- inside -------------------------------------------------------------------------------------------

    def _complain(self, error: NotHeard) -> bool:
        """Says in the journal what is wrong, each thing once: it would come with every press. Whether it did."""
        if isinstance(error, NothingSaid):
            log.info("talk: %s", error)
        elif str(error) not in self._said:
            log.warning("talk: %s; flashd doctor looks at the microphone", error)
            self._said.add(str(error))
            return True
        return False

    def _while(self, wanted: Wanted) -> Wanted:
        return lambda: wanted() and self._may_listen()

    def _heard(self, record: Callable[[], bytes], wanted: Wanted) -> str:
        """What was understood of what `record` gives, which is nothing if nothing was to be heard."""
        self._tell(Stage.LISTENING, "")
        try:
            text = self._understood(record(), wanted)
        except NotHeard as error:
            if not wanted():
                text = ""
            else:
                self._complain(error)
                self._tell(Stage.OVER if isinstance(error, NothingSaid) else Stage.FAILED, str(error))
                return ""
        self._tell(Stage.OVER, f"heard: {text}" if text else "")
        return text

    def _understood(self, samples: bytes, wanted: Wanted) -> str:
        if not samples or not wanted():
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

    def _pressed(self, press: Press, wanted: Wanted) -> bytes:
        """Samples while a button is held and a little longer, or after a tap until speech ends."""
        samples = bytearray()
        end = EndOfSpeech(self._listener, wanted) if self._listener is not None else None
        followed = 0
        for piece in self._microphone.stream(lambda: wanted() and not press.is_over):
            samples += piece
            if end is not None and press.is_tap:
                if end.is_in(bytes(samples[followed:])):
                    break
                followed = len(samples)
            if len(samples) >= self._most:
                break
        return b"" if press.is_short and not press.is_tap else bytes(samples[: self._most])

    def _word(self, pieces: Generator[bytes], wanted: Wanted) -> tuple[str, bytes] | None:
        """The wake word that comes, and the sound since its end."""
        assert self._listener is not None
        latest, heard, is_quiet = b"", 0, True
        for piece in pieces:
            latest = (latest + piece)[-_nbytes(LATE_SECONDS) :]
            word = self._listener.word(piece, wanted, anew=not heard)
            if word is not None:
                return word, latest
            heard += len(piece)
            if self._fails:
                self._fails = False
                self._tell(Stage.OVER, "")
            is_quiet = is_quiet and is_silent(latest)
            if is_quiet and heard > _nbytes(SILENT_SECONDS):
                raise NotHeard("the microphone gives silence; alsamixer shows whether it is switched off")
        if wanted():
            raise NotHeard("the microphone's program ended")
        return None

    def _spoken(self, pieces: Generator[bytes], behind: bytes, wanted: Wanted) -> bytes:
        """Samples from those `behind` on, until speech ends."""
        assert self._listener is not None
        end, samples = EndOfSpeech(self._listener, wanted), bytearray(behind)
        end.is_in(behind)
        for piece in pieces:
            samples += piece
            if end.is_in(piece) or len(samples) >= self._most:
                break
        pieces.close()  # nothing is recorded while it is understood
        return bytes(samples[: self._most])


def _nbytes(long: float) -> int:
    return round(long * RATE) * SAMPLE_BYTES
