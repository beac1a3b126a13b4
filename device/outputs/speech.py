"""Speech: a program is given each sentence of an answer while the rest is still being made."""

from __future__ import annotations

import logging
import re
import subprocess
import threading
from queue import Empty, Queue

from device.outputs.output import InTurn, OneText, Surroundings
from flashd.config.devices import Speech
from flashd.daemon.job import Event, State
from flashd.system.program import goes_first, kill

log = logging.getLogger(__name__)

SPEECH_SECONDS = 120.0
"""How long a program may take for a sentence."""

SENTENCE = re.compile(r"(.*?[.!?:;\n])(?=\s|$)", re.DOTALL)


class Voice(OneText):
    """Says an answer sentence by sentence while it comes. It falls silent where it is cancelled or hushed."""

    def __init__(self, settings: Speech, around: Surroundings) -> None:
        super().__init__()
        self._command, self._until, self._muted = settings.command, settings.until, around.muted
        self._lock = threading.Lock()
        self._text = ""
        self._sentences: Queue[tuple[int, str] | None] = Queue(maxsize=256)
        self._speaking: subprocess.Popen[bytes] | None = None
        self._silences = 0  # so often was it silenced; what was to be said before the last time is not said
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="speech", daemon=True)
        self._thread.start()

    def event(self, event: Event) -> None:
        with self._lock:
            if event.kind == "started" and self._turns.over and self._until == "job":
                self._silence()
            super().event(event)

    def hush(self) -> None:
        with self._lock:
            if self._until != "end" or self._muted():
                self._turns = InTurn()  # what comes of answers that have begun is not said either
                self._text = ""
                self._silence()

    def close(self) -> None:
        with self._lock:
            self._silence()
        self._sentences.put(None)

    def _follow(self, event: Event) -> None:
        if event.kind == "started":
            self._text = ""
        elif event.kind == "restarted":
            self._text = ""
            self._silence()  # it will be said anew
        elif event.kind == "text":
            self._text += event.text
            while (match := SENTENCE.match(self._text)) and match.end() < len(self._text):
                self._say(match.group(1))
                self._text = self._text[match.end() :]
        elif event.end is not None:
            if event.end.state is State.CANCELLED:
                self._silence()
            else:
                self._say(self._text)
            self._text = ""

    def _say(self, sentence: str) -> None:
        if sentence.strip() and not self._muted() and not self._sentences.full():
            self._sentences.put((self._silences, sentence.strip()))

    def _silence(self) -> None:
        try:
            while True:
                self._sentences.get_nowait()
        except Empty:
            pass
        self._silences += 1
        if self._speaking is not None:
            kill(self._speaking)

    def _run(self) -> None:
        while (entry := self._sentences.get()) is not None:
            try:
                self._speak(*entry)
            except (OSError, subprocess.TimeoutExpired) as error:
                self._complain(str(error))

    def _complain(self, what: str) -> None:
        """Says in the journal what is wrong with the voice, each thing once: it would come with every sentence."""
        if what not in self._said:
            log.warning("speech: %s; flashd doctor looks at the sound card", what)
        self._said.add(what)

    def _speak(self, silences: int, sentence: str) -> None:
        with self._lock:
            if silences != self._silences:
                return
            # a session of its own: a shell that pipes one program into another falls silent as a whole
            speaking = self._speaking = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
        with speaking:
            goes_first(speaking)
            try:
                speaking.communicate(sentence.encode(), timeout=SPEECH_SECONDS)
            finally:
                with self._lock:
                    self._speaking = None
                kill(speaking)
        if speaking.returncode and silences == self._silences:
            raise OSError(f"{self._command[0]} ended with {speaking.returncode}")
