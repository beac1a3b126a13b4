"""A short tone that says that a wake word was heard."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Sequence

import numpy as np

from device.hearing.recogniser import wav
from flashd.config.hearing import RATE
from flashd.system.program import goes_first, kill

log = logging.getLogger(__name__)

HERTZ, SECONDS, LOUDNESS, SWELL_SECONDS = 880, 0.15, 8000, 0.02
"""Of 32,767 as the loudest. It swells and fades, so that it does not crack."""

PLAY_SECONDS = 5.0
"""How long the program may take. A sound card may sleep first."""


class Tone:
    """Plays the tone by a program that gets a WAV file. Nobody waits for it; that it fails is said once."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command, self._failed, self._playing = list(command), False, threading.Lock()

    def play(self) -> None:
        """Begins to play, unless it plays still."""
        if self._playing.acquire(blocking=False):
            threading.Thread(target=self._play, name="tone", daemon=True).start()

    def _play(self) -> None:
        try:
            program = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            with program:
                goes_first(program)
                try:
                    program.communicate(sound(), timeout=PLAY_SECONDS)
                finally:
                    kill(program)
            if program.returncode:
                raise OSError(f"{self._command[0]} ended with {program.returncode}")
        except (OSError, subprocess.TimeoutExpired) as error:
            if not self._failed:
                log.warning("tone: %s; flashd doctor looks at the sound card", error)
            self._failed = True
        finally:
            self._playing.release()


def sound() -> bytes:
    """The tone as a WAV file."""
    times = np.arange(round(SECONDS * RATE)) / RATE
    loud = np.minimum(1, np.minimum(times, times[::-1]) / SWELL_SECONDS) * LOUDNESS
    return wav((np.sin(2 * np.pi * HERTZ * times) * loud).astype("<i2").tobytes())
