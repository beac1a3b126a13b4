"""A process that holds sherpa-onnx and its model. It hears what comes through standard input, and prints the words.

It is run by its path and imports nothing of flashd, so it holds no more than it needs. In: one JSON line that says
what to make, {"make": "from_whisper", "with": {"encoder": "..."}}; then, for each recording, 4 bytes of its length,
little endian, and its samples. Out: one JSON line each, {"ready": true} and then {"text": "..."}. If it fails it says
why on standard error, where sherpa-onnx says so too, and ends.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from array import array
from typing import BinaryIO

RATE = 16_000


def main() -> None:
    # what libraries print must not come between the lines
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from sherpa_onnx import OfflineRecognizer

    wish = json.loads(sys.stdin.buffer.readline())
    recogniser = getattr(OfflineRecognizer, wish["make"])(**wish["with"])
    _say(out, ready=True)
    while samples := _next(sys.stdin.buffer):
        stream = recogniser.create_stream()
        stream.accept_waveform(RATE, samples)
        recogniser.decode_stream(stream)
        _say(out, text=stream.result.text)


def _next(file: BinaryIO) -> array[float]:
    """Samples from -1 to 1. numpy would take more memory than all else here but the model."""
    head = file.read(4)
    samples = array("h", file.read(*struct.unpack("<I", head)) if len(head) == 4 else b"")
    if sys.byteorder == "big":
        samples.byteswap()
    return array("f", (sample / 32768 for sample in samples))


def _say(out: object, **fields: object) -> None:
    print(json.dumps(fields), file=out, flush=True)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
