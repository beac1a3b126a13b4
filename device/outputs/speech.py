"""Speech: a program is given each sentence of an answer while the rest is still being made."""

from __future__ import annotations

import logging
import re
import subprocess
import threading
from queue import Empty, Queue

from device.outputs.output import OneText, Surroundings
from flashd.config.devices import Speech
from flashd.daemon.job import Event, State
from flashd.system.program import goes_first, kill

log = logging.getLogger(__name__)

SPEECH_SECONDS = 120.0
"""How long a program may take for a sentence."""

SENTENCE = re.compile(r"(.*?[.!?:;\n])(?=\s|$)", re.DOTALL)


class Voice(OneText):
    """Says an answer sentence by sentence; a cancelled one falls silent."""

    def __init__(self, settings: Speech, around: Surroundings) -> None:
        super().__init__()
        self._command, self._muted = settings.command, around.muted
        self._text = ""
        self._sentences: Queue[str | None] = Queue(maxsize=256)
        self._speaking: subprocess.Popen[bytes] | None = None
        self._silenced = False  # the one that speaks was ended by us
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="speech", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._silence()
        self._sentences.put(None)

    def _follow(self, event: Event) -> None:
        if event.kind in ("started", "restarted"):
            self._text = ""
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
            self._sentences.put(sentence.strip())

    def _silence(self) -> None:
        try:
            while True:
                self._sentences.get_nowait()
        except Empty:
            pass
        speaking = self._speaking
        if speaking is not None:
            self._silenced = True
            kill(speaking)

    def _run(self) -> None:
        while (sentence := self._sentences.get()) is not None:
            try:
                self._speak(sentence)
            except (OSError, subprocess.TimeoutExpired) as error:
                self._complain(str(error))

    def _complain(self, what: str) -> None:
        """Says in the journal what is wrong with the voice, each thing once: it would come with every sentence."""
        if what not in self._said:
            log.warning("speech: %s; flashd doctor looks at the sound card", what)
        self._said.add(what)

    def _speak(self, sentence: str) -> None:
        self._silenced = False
        # a session of its own: a shell that pipes one program into another falls silent as a whole
        with subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as speaking:
            self._speaking = speaking
            goes_first(speaking)
            try:
                speaking.communicate(sentence.encode(), timeout=SPEECH_SECONDS)
            finally:
                self._speaking = None
                kill(speaking)
        if speaking.returncode and not self._silenced:
            raise OSError(f"{self._command[0]} ended with {speaking.returncode}")
