"""sherpa-onnx in a process of its own, which keeps the model in RAM and is held to its share of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from device.hearing.recogniser import Recogniser
from device.hearing.sherpa_child import KeepsChild, SherpaChild, check_installed, model_file
from flashd.config.hearing import Hearing, Sherpa
from flashd.errors import InputMissing

WAV_HEAD = 44
"""Bytes before the samples of the WAV files that flashd makes."""

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


class BySherpa(KeepsChild, Recogniser):
    """It starts with the service."""

    def __init__(self, settings: Sherpa, hearing: Hearing) -> None:
        self._settings, self._hearing = settings, hearing
        super().__init__("sherpa_process.py", hearing.limit)

    def recognise(self, sound: bytes, wanted: Callable[[], bool]) -> str:
        until = time.monotonic() + self._hearing.timeout
        process = self._process or self._start()
        try:
            if not self._is_ready:
                self._text(process, lambda: time.monotonic() < until)
                self._is_ready = True
            samples = sound[WAV_HEAD:]
            process.send(struct.pack("<I", len(samples)) + samples)
            return self._text(process, lambda: wanted() and time.monotonic() < until)
        except BaseException:
            self.close()
            raise
        finally:
            if not wanted():  # whoever speaks anew need not wait for the model, which loads meanwhile
                self._start()

    def _wish(self) -> object:
        make, arguments = made_of(self._settings)
        return {"make": make, "with": arguments}

    def _text(self, process: SherpaChild, go_on: Callable[[], bool]) -> str:
        return process.answer(_Line, go_on, self._hearing.timeout).text


class _Line(msgspec.Struct):
    text: str = ""


def made_of(settings: Sherpa) -> tuple[str, dict[str, Any]]:
    """What of sherpa-onnx makes the model, and with which arguments. Raises InputMissing."""
    check_installed()
    folder = Path(settings.folder)
    for make, patterns in MAKERS[settings.model]:
        found = {name: model_file(folder, pattern) for name, pattern in {**patterns, "tokens": TOKENS}.items()}
        if all(found.values()):
            language = {"language": settings.language} if settings.language else {}
            return make, {**found, **language, "num_threads": settings.threads}
    needed = ", ".join([*MAKERS[settings.model][-1][1].values(), TOKENS])
    raise InputMissing(f"{folder}: a model of kind {settings.model} has the files {needed}; not all are there")
