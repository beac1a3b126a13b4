"""Token ids are llama.cpp's own.

data/token_ids.json was made with llama-cpp-python on the same files; it says how. The larger model is checked
where FLASHD_QWEN_GGUF names Qwen2.5-Coder-1.5B-Instruct's file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flashd.engine.text import Encoder
from flashd.errors import DataError
from flashd.pack import tokenizer
from flashd.pack.gguf import GgufModel
from tests import tiny

GOLDEN = json.loads((Path(__file__).parent / "data" / "token_ids.json").read_text("utf-8"))


def check(path: Path, ids: list[int]) -> None:
    vocabulary = tokenizer.read_vocabulary(GgufModel(path))
    encoder = Encoder(vocabulary.tokenizer_json, vocabulary.bos, vocabulary.add_bos)
    assert encoder.encode(GOLDEN["text"]) == ids
    spelled = b"".join(vocabulary.token_bytes[i] for i in ids).decode()
    controls = GOLDEN["text"].replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert spelled in (controls, controls.replace("e\u0301", "é"))


def test_smollm(smollm: Path) -> None:
    check(smollm, GOLDEN["smollm"])


@pytest.mark.skipif("FLASHD_QWEN_GGUF" not in os.environ, reason="FLASHD_QWEN_GGUF names no file")
def test_qwen2() -> None:
    check(Path(os.environ["FLASHD_QWEN_GGUF"]), GOLDEN["qwen2"])


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tokenizer.SPLITS, "gpt-2")
    with pytest.raises(DataError, match=r"'gpt-2' is not supported; known are .*llama-bpe.*qwen2.*smollm"):
        tokenizer.read_vocabulary(GgufModel(tiny.write(tmp_path / "m.gguf")))


def test_end_tokens_are_found_by_number_and_by_name(smollm: Path) -> None:
    assert tokenizer.read_vocabulary(GgufModel(smollm)).eos == [2, 0]
