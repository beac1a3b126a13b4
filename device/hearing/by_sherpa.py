"""sherpa-onnx in a process of its own, which keeps the model in RAM and is held to its share of it."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from device.hearing.recogniser import MOST_TEXT, NotHeard, Recogniser
from flashd.config.hearing import Hearing, Sherpa
from flashd.errors import NOT_JSON, InputMissing
from flashd.system.program import goes_first, kill, last_line, limit_memory, pieces, read_now

PROCESS = Path(__file__).with_name("sherpa_process.py")

WAV_HEAD = 44
"""Bytes before the samples of the WAV files that flashd makes."""

MOST_LINE = 8 * MOST_TEXT

MAKERS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "moonshine": (
        ("from_moonshine_v2", {"encoder": "encoder_model.ort", "decoder": "decoder_model_merged.ort"}),
        (
            "from_moonshine",
            {
                "preprocessor": "preprocess*.onnx", "encoder": "encode*.onnx", "uncached_decoder": "uncached*.onnx",
                "cached_decoder": "cached*.onnx",
            },
        ),
    ),
    "whisper": (("from_whisper", {"encoder": "*encoder*.onnx", "decoder": "*decoder*.onnx"}),),
    "zipformer": (
        ("from_transducer", {"encoder": "encoder*.onnx", "decoder": "decoder*.onnx", "joiner": "joiner*.onnx"}),
    ),
    "zipformer-ctc": (("from_zipformer_ctc", {"model": "model*.onnx"}),),
    "sense-voice": (("from_sense_voice", {"model": "model*.onnx"}),),
}  # fmt: skip
"""What of sherpa-onnx makes each kind of model, and of which files, as its own collection of models names them."""

TOKENS = "*tokens.txt"


class BySherpa(Recogniser):
    """The process starts with the service, since it takes a while to load a model. One that ended is started anew."""

    def __init__(self, settings: Sherpa, hearing: Hearing) -> None:
        self._settings, self._hearing = settings, hearing
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        with suppress(NotHeard):  # the first press says why
            self._start()

    def recognise(self, sound: bytes, wanted: Callable[[], bool]) -> str:
        until = time.monotonic() + self._hearing.timeout
        if self._process is None:
            self._start()
        try:
            if not self._is_ready:
                self._line(lambda: time.monotonic() < until)
                self._is_ready = True
            samples = sound[WAV_HEAD:]
            self._send(struct.pack("<I", len(samples)) + samples)
            return self._line(lambda: wanted() and time.monotonic() < until).text
        except BaseException:
            self.close()
            raise
        finally:
            if not wanted():  # whoever speaks anew need not wait for the model, which loads meanwhile
                self._start()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            kill(process)
            with suppress(BrokenPipeError), process:
                """Its pipes are closed, and it is waited for."""

    def _start(self) -> None:
        self.close()
        try:
            make, arguments = made_of(self._settings)
        except InputMissing as error:
            raise NotHeard(str(error)) from error
        # its share of memory is for the model, and not for the stacks of threads that would have nothing to do
        few = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROCESS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, env=os.environ | few,
        )  # fmt: skip
        self._is_ready = False
        goes_first(self._process)
        limit_memory(self._process, self._hearing.limit)
        self._send(msgspec.json.encode({"make": make, "with": arguments}) + b"\n")

    def _send(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the read that follows says why
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _line(self, go_on: Callable[[], bool]) -> _Line:
        """The next line that it prints."""
        process = self._process
        assert process is not None and process.stdout is not None and process.stderr is not None
        line = b""
        for piece in pieces(process.stdout.fileno(), go_on):
            line += piece
            if line.endswith(b"\n") or len(line) > MOST_LINE:
                break
        try:
            return msgspec.json.decode(line, type=_Line)
        except NOT_JSON as error:
            if process.poll() is None and not go_on():
                raise NotHeard(f"sherpa-onnx took more than {self._hearing.timeout:g} s") from error
            why = last_line(read_now(process.stderr.fileno())) or f"it may use {self._hearing.memory} of RAM"
            raise NotHeard(f"sherpa-onnx ended: {why}") from error


class _Line(msgspec.Struct):
    text: str = ""


def made_of(settings: Sherpa) -> tuple[str, dict[str, Any]]:
    """What of sherpa-onnx makes the model, and with which arguments. Raises InputMissing."""
    if importlib.util.find_spec("sherpa_onnx") is None:
        raise InputMissing("sherpa-onnx is not installed; pip install 'flashd[voice]'")
    folder = Path(settings.folder)
    for make, patterns in MAKERS[settings.model]:
        found = {name: _file(folder, pattern) for name, pattern in {**patterns, "tokens": TOKENS}.items()}
        if all(found.values()):
            language = {"language": settings.language} if settings.language else {}
            return make, {**found, **language, "num_threads": settings.threads}
    needed = ", ".join([*MAKERS[settings.model][-1][1].values(), TOKENS])
    raise InputMissing(f"{folder}: a model of kind {settings.model} has the files {needed}; not all are there")


def _file(folder: Path, pattern: str) -> str:
    """A file of the model, the one with int8 weights if there are two."""
    return str(min(folder.glob(pattern), key=lambda path: (".int8." not in path.name, path.name), default=""))
