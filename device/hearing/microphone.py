"""The microphone: a program records, and what it writes is kept in memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import numpy as np

from device.hearing.recogniser import NotHeard
from flashd.config.hearing import RATE, SAMPLE_BYTES, Hearing
from flashd.system.program import goes_first, kill, last_line, read_now, read_while

TAIL_SECONDS = 0.3
"""So long is recorded on when the button is let go: people let go with the last word."""


class Microphone:
    """Records with the configured program. It takes no memory and no sound card while it does not record."""

    def __init__(self, hearing: Hearing) -> None:
        self._command, self._most = hearing.microphone, hearing.recorded

    def record(self, held: Callable[[], bool], wanted: Callable[[], bool]) -> bytes:
        """Samples while the button is held, and a little longer, up to the most that is allowed.

        It ends at once if it is not `wanted` any longer. Raises NotHeard if the microphone gives nothing.
        """
        let_go: float | None = None

        def go_on() -> bool:
            nonlocal let_go
            if let_go is None and not held():
                let_go = time.monotonic()
            return wanted() and (let_go is None or time.monotonic() < let_go + TAIL_SECONDS)

        with self._started() as program:
            assert program.stdout is not None and program.stderr is not None
            goes_first(program)
            try:
                samples = read_while(program.stdout.fileno(), go_on, self._most)
            finally:
                kill(program)
            complaint = b"" if samples else read_now(program.stderr.fileno())
        samples = samples[: len(samples) // SAMPLE_BYTES * SAMPLE_BYTES]
        if not samples and wanted():
            raise NotHeard(f"the microphone gives nothing: {last_line(complaint) or self._command[0]}")
        return samples

    def _started(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise NotHeard(
                f"the microphone's program cannot be started: {self._command[0]}: {error.strerror}"
            ) from error


def seconds(samples: bytes) -> float:
    return len(samples) / (SAMPLE_BYTES * RATE)


def is_silent(samples: bytes) -> bool:
    """Whether every sample is the same, as those of a microphone that is switched off in the mixer."""
    return bool(np.ptp(np.frombuffer(samples, "<i2")) == 0)
