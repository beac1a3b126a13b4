"""A process that holds sherpa-onnx's detector of speech and spotter of keywords. It says what it hears in a stream.

It is run by its path and imports nothing of flashd, so it holds no more than it needs. In: one JSON line that says
what to make, as `made_of` in listener.py writes it; then, for each piece of sound, a letter, 4 bytes of its length,
little endian, and its samples. `w` asks whether a wake word has ended in it, and `s` whether somebody speaks; `W` and
`S` ask the same of a new stream. Out: one JSON line each, {} when all is made, then {"word": 0}, the word's place
among the words or -1, or {"speaks": true}. If it fails it says why on standard error, and ends.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from array import array
from typing import BinaryIO

RATE = 16_000
MOST_SECONDS = 120.0
"""It keeps so much of what is said on and on. Nothing is recorded for so long."""

LEAST_SPEECH = 0.1
"""Seconds. What is shorter is a knock."""


def main() -> None:
    # what libraries print must not come between the lines
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    wish = json.loads(sys.stdin.buffer.readline())
    speech = _Speech(wish["vad"], wish["pause"])
    spotter = _Spotter(wish["spotter"], wish["words"], wish["threshold"]) if wish["words"] else None
    _say(out)
    while (piece := _next(sys.stdin.buffer)) is not None:
        letter, samples = piece
        if letter in "wW" and spotter is not None:
            _say(out, word=spotter.heard(samples, anew=letter == "W"))
        else:
            _say(out, speaks=speech.goes_on(samples, anew=letter == "S"))


class _Speech:
    """Silero's detector, which says whether somebody speaks."""

    def __init__(self, model: str, pause: float) -> None:
        import sherpa_onnx

        silero = sherpa_onnx.SileroVadModelConfig(
            model=model,
            min_silence_duration=pause,
            min_speech_duration=LEAST_SPEECH,
            max_speech_duration=MOST_SECONDS,
        )
        config = sherpa_onnx.VadModelConfig(silero_vad=silero, sample_rate=RATE, num_threads=1)
        self._detector = sherpa_onnx.VoiceActivityDetector(config, buffer_size_in_seconds=MOST_SECONDS)

    def goes_on(self, samples: array[float], anew: bool) -> bool:
        if anew:
            self._detector.reset()
        self._detector.accept_waveform(samples)
        while not self._detector.empty():  # it keeps what was said, and nobody wants it
            self._detector.pop()
        return bool(self._detector.is_speech_detected())


class _Spotter:
    """sherpa-onnx's spotter of keywords."""

    def __init__(self, files: dict[str, str], words: list[str], threshold: float) -> None:
        import sherpa_onnx

        bpe = files.pop("bpe")
        lines = "".join(f"{spelled} @{i}\n" for i, spelled in enumerate(_spelled(words, files["tokens"], bpe)))
        with os.fdopen(os.memfd_create("words"), "w", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            self._spotter = sherpa_onnx.KeywordSpotter(
                **files, keywords_file=f"/proc/self/fd/{file.fileno()}", keywords_threshold=threshold, num_threads=1
            )
        self._stream = self._spotter.create_stream()

    def heard(self, samples: array[float], anew: bool) -> int:
        if anew:
            self._stream = self._spotter.create_stream()
        self._stream.accept_waveform(RATE, samples)
        word = -1
        while self._spotter.is_ready(self._stream):
            self._spotter.decode_stream(self._stream)
            if found := self._spotter.get_result(self._stream):
                word = int(found)
                self._spotter.reset_stream(self._stream)
        return word


def _spelled(words: list[str], tokens: str, bpe: str) -> list[str]:
    """Each word in the model's tokens, with spaces between them. It exits if the model cannot spell one."""
    with open(tokens, encoding="utf-8") as file:  # noqa: PTH123
        known = {line.split()[0] for line in file if line.strip()}
    if not bpe:
        ways = [[word.split()] for word in words]
    else:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=bpe)
        # the letters of most models are capitals
        ways = [pieces.encode([word, word.upper(), word.lower()], out_type=str) for word in words]
    spelled = []
    for word, tries in zip(words, ways, strict=True):
        right = next((way for way in tries if known.issuperset(way)), None)
        if right is None:
            unknown = next(token for token in tries[0] if token not in known)
            sys.exit(f"the spotter cannot spell {word!r}: its model has no token {unknown!r}")
        spelled.append(" ".join(right))
    return spelled


def _next(file: BinaryIO) -> tuple[str, array[float]] | None:
    """A letter, and samples from -1 to 1. numpy would take more memory than all else here."""
    head = file.read(5)
    if len(head) < 5:
        return None
    letter, length = struct.unpack("<cI", head)
    samples = array("h", file.read(length))
    if sys.byteorder == "big":
        samples.byteswap()
    return letter.decode("ascii"), array("f", (sample / 32768 for sample in samples))


def _say(out: object, **fields: object) -> None:
    print(json.dumps(fields), file=out, flush=True)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
