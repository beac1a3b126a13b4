"""Any program that makes text of a WAV file, such as whisper.cpp's or pocketsphinx."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

from device.hearing.recogniser import MOST_TEXT, NotHeard, Recogniser
from flashd.config.hearing import Hearing, Program
from flashd.system.program import goes_first, kill, read_to_end, with_memory

MOST_PRINTED = 4 * MOST_TEXT
"""Bytes: a character has up to 4."""


class ByProgram(Recogniser):
    """The program is started for each recording, and what it holds is free again afterwards."""

    def __init__(self, settings: Program, hearing: Hearing) -> None:
        self._command, self._hearing = settings.command, hearing

    def recognise(self, sound: bytes, wanted: Callable[[], bool]) -> str:
        until = time.monotonic() + self._hearing.timeout
        with self._started(sound) as program:
            try:
                goes_first(program)
                return self._heard(program, lambda: wanted() and time.monotonic() < until)
            finally:
                kill(program)

    def _started(self, sound: bytes) -> subprocess.Popen[bytes]:
        try:
            # in memory, and whole: some programs seek in it
            with os.fdopen(os.memfd_create("speech"), "w+b") as file:
                file.write(sound)
                file.seek(0)
                return subprocess.Popen(
                    with_memory(self._command, self._hearing.limit),
                    stdin=file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError as error:
            raise NotHeard(f"the recogniser cannot be started: {self._command[0]}: {error.strerror}") from error

    def _heard(self, program: subprocess.Popen[bytes], go_on: Callable[[], bool]) -> str:
        printed, name = read_to_end(program, go_on, MOST_PRINTED), self._command[0]
        if len(printed) == MOST_PRINTED:
            raise NotHeard(f"the recogniser prints more than text: {name}")
        if program.returncode is None:
            raise NotHeard(f"the recogniser took more than {self._hearing.timeout:g} s: {name}")
        if program.returncode:
            more = f"it may use {self._hearing.memory} of RAM"
            raise NotHeard(f"the recogniser failed with {program.returncode}: {name}; {more}")
        return printed.decode("utf-8", "replace")
