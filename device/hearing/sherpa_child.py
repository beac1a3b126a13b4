"""A process that holds sherpa-onnx and its models, and is held to its share of memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from device.hearing.recogniser import MOST_TEXT, NotHeard
from flashd.errors import NOT_JSON, InputMissing
from flashd.system.memory import MIB
from flashd.system.program import goes_first, kill, last_line, limit_memory, pieces, read_now

MOST_LINE = 8 * MOST_TEXT

Answer = TypeVar("Answer", bound=msgspec.Struct)


class SherpaChild:
    """It runs a program of this folder, which is told what to make by its first line.

    Args:
        program: its file.
        wish: what it is to make.
        memory: bytes that it may have.
    """

    def __init__(self, program: str, wish: object, memory: int) -> None:
        self._memory = memory
        # its share of memory is for the model, and not for the stacks of threads that would have nothing to do
        few = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name(program))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | few,
        )  # fmt: skip
        goes_first(self._process)
        limit_memory(self._process, memory)
        self.send(msgspec.json.encode(wish) + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the read that follows says why
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def answer(self, kind: type[Answer], go_on: Callable[[], bool], seconds: float) -> Answer:
        """The next line that it prints.

        Args:
            kind: what the line has.
            go_on: whether to wait on, which is for so many seconds at the most.

        Raises NotHeard.
        """
        process = self._process
        assert process.stdout is not None and process.stderr is not None
        line = b""
        for piece in pieces(process.stdout.fileno(), go_on):
            line += piece
            if line.endswith(b"\n") or len(line) > MOST_LINE:
                break
        try:
            return msgspec.json.decode(line, type=kind)
        except NOT_JSON as error:
            if process.poll() is None and not go_on():
                raise NotHeard(f"sherpa-onnx took more than {seconds:g} s") from error
            why = last_line(read_now(process.stderr.fileno())) or f"it may use {self._memory // MIB}M of RAM"
            raise NotHeard(f"sherpa-onnx ended: {why}") from error

    def close(self) -> None:
        kill(self._process)
        with suppress(BrokenPipeError), self._process:
            """Its pipes are closed, and it is waited for."""


class KeepsChild:
    """Has a SherpaChild, which is started at once, since it takes a while to load a model.

    One that ended is started anew when it is needed. A subclass says what the process is to make.
    """

    def __init__(self, program: str, memory: int) -> None:
        self._program, self._limit = program, memory
        self._process: SherpaChild | None = None
        self._is_ready = False
        with suppress(NotHeard):  # whoever needs it first is told why
            self._start()

    def _wish(self) -> object:
        """What the process is to make. Raises InputMissing."""
        raise NotImplementedError

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _start(self) -> SherpaChild:
        """Raises NotHeard."""
        self.close()
        try:
            wish = self._wish()
        except InputMissing as error:
            raise NotHeard(str(error)) from error
        self._process, self._is_ready = SherpaChild(self._program, wish, self._limit), False
        return self._process


def check_installed() -> None:
    """Raises InputMissing."""
    if importlib.util.find_spec("sherpa_onnx") is None:
        raise InputMissing("sherpa-onnx is not installed; pip install 'flashd[voice]'")


def model_file(folder: Path, pattern: str) -> str:
    """A file of a model, the one with int8 weights if there are two; empty if there is none."""
    return str(min(folder.glob(pattern), key=lambda path: (".int8." not in path.name, path.name), default=""))
