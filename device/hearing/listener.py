"""What hears that somebody speaks: wake words, and the end of speech. sherpa-onnx does it in a process of its own."""

from __future__ import annotations

import importlib.util
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from device.hearing.recogniser import NothingSaid
from device.hearing.sherpa_child import KeepsChild, SherpaChild, check_installed, model_file
from flashd.config.hearing import RATE, SAMPLE_BYTES
from flashd.config.hearing import Listener as ListenerSettings
from flashd.errors import InputMissing

SPOTTER = {"encoder": "encoder*.onnx", "decoder": "decoder*.onnx", "joiner": "joiner*.onnx", "tokens": "tokens.txt"}
"""The files of a model that spots keywords, as sherpa-onnx's own collection of models names them."""

SPEAKS_WITHIN = 5.0
"""Seconds that somebody has to begin."""

LOADS_WITHIN = 60.0
ANSWERS_WITHIN = 10.0
"""Seconds. A piece takes a hundredth of that unless the processor has much else to do."""


class _Line(msgspec.Struct):
    word: int = -1
    speaks: bool = False


class Listener(KeepsChild):
    """It starts with the service, and is used by one thread at a time.

    Each method raises NotHeard if the process fails.

    Args:
        settings: of the models.
        words: the wake words.
    """

    def __init__(self, settings: ListenerSettings, words: Sequence[str]) -> None:
        self._settings, self._words = settings, list(words)
        super().__init__("listener_process.py", settings.limit)

    def word(self, samples: bytes, wanted: Callable[[], bool], anew: bool = False) -> str | None:
        """The wake word that has ended in these samples. They go on from those before, unless heard `anew`."""
        line = self._asked(b"W" if anew else b"w", samples, wanted)
        return self._words[line.word] if 0 <= line.word < len(self._words) else None

    def speaks(self, samples: bytes, wanted: Callable[[], bool], anew: bool = False) -> bool:
        """Whether somebody speaks at the end of these samples, or has paused for a moment."""
        return self._asked(b"S" if anew else b"s", samples, wanted).speaks

    def _wish(self) -> object:
        return made_of(self._settings, self._words)

    def _asked(self, letter: bytes, samples: bytes, wanted: Callable[[], bool]) -> _Line:
        process = self._process or self._start()
        try:
            if not self._is_ready:
                _answer(process, wanted, LOADS_WITHIN)
                self._is_ready = True
            process.send(struct.pack("<cI", letter, len(samples)) + samples)
            return _answer(process, lambda: True, ANSWERS_WITHIN)
        except BaseException:
            if self._is_ready or wanted():  # otherwise it goes on loading
                self.close()
            raise


def _answer(process: SherpaChild, wanted: Callable[[], bool], seconds: float) -> _Line:
    until = time.monotonic() + seconds
    return process.answer(_Line, lambda: wanted() and time.monotonic() < until, seconds)


class EndOfSpeech:
    """Follows one recording to where speech ends in it.

    Args:
        listener: what hears.
        wanted: whether to go on.
    """

    def __init__(self, listener: Listener, wanted: Callable[[], bool]) -> None:
        self._listener, self._wanted = listener, wanted
        self._seconds = 0.0
        self._spoke = False

    def is_in(self, samples: bytes) -> bool:
        """Whether speech ended in the next samples. Raises NothingSaid if nobody begins to speak."""
        speaks = self._listener.speaks(samples, self._wanted, anew=self._seconds == 0)
        self._seconds += len(samples) / (SAMPLE_BYTES * RATE)
        self._spoke = self._spoke or speaks
        if not self._spoke and self._seconds > SPEAKS_WITHIN:
            raise NothingSaid(f"nobody spoke within {SPEAKS_WITHIN:g} s")
        return self._spoke and not speaks


def made_of(settings: ListenerSettings, words: Sequence[str]) -> dict[str, Any]:
    """What the process is to make, and of which files. Raises InputMissing."""
    check_installed()
    return {
        "vad": _detector(settings), "pause": settings.pause, "spotter": _spotter(settings), "words": list(words),
        "threshold": settings.threshold,
    }  # fmt: skip


def _detector(settings: ListenerSettings) -> str:
    if settings.vad is not None:
        if not Path(settings.vad).is_file():
            raise InputMissing(f"{settings.vad}: this file is not there")
        return settings.vad
    package = importlib.util.find_spec("silero_vad")  # which is not imported: that would need torch
    for folder in (package.submodule_search_locations or ()) if package else ():
        if file := model_file(Path(folder), "data/silero_vad.onnx"):
            return file
    raise InputMissing("the silero-vad package is not installed; pip install --no-deps silero-vad, or say vad: FILE")


def _spotter(settings: ListenerSettings) -> dict[str, str] | None:
    if settings.spotter is None:
        return None
    folder = Path(settings.spotter)
    found = {name: model_file(folder, pattern) for name, pattern in SPOTTER.items()}
    if not all(found.values()):
        raise InputMissing(f"{folder}: a spotter has the files {', '.join(SPOTTER.values())}; not all are there")
    return {**found, "bpe": model_file(folder, "bpe.model")}
