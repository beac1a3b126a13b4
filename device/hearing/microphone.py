"""The microphone: a program records, and what it writes is kept in memory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator

import numpy as np

from device.hearing.recogniser import NotHeard
from flashd.config.hearing import RATE, SAMPLE_BYTES, Hearing
from flashd.system.program import goes_first, kill, last_line, pieces, read_now


class Microphone:
    """Records with the configured program. It takes no memory and no sound card while it does not record."""

    def __init__(self, hearing: Hearing) -> None:
        self._command = hearing.microphone

    def stream(self, wanted: Callable[[], bool]) -> Generator[bytes]:
        """Whole samples as they come, until they are not `wanted` any longer or the generator is closed.

        Raises NotHeard if the microphone gives nothing.
        """
        with self._started() as program:
            assert program.stdout is not None and program.stderr is not None
            goes_first(program)
            half, some = b"", False
            try:
                for piece in pieces(program.stdout.fileno(), wanted):
                    piece, some = half + piece, True
                    whole = len(piece) // SAMPLE_BYTES * SAMPLE_BYTES
                    half = piece[whole:]
                    if whole:
                        yield piece[:whole]
            finally:
                kill(program)
            complaint = b"" if some else read_now(program.stderr.fileno())
        if not some and wanted():
            raise NotHeard(f"the microphone gives nothing: {last_line(complaint) or self._command[0]}")

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
