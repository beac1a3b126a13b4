"""Token ids are llama.cpp's own.

data/token_ids.json was made with llama-cpp-python on the same files, data/sentence_piece.json with the sentencepiece
package by the script beside it; they say how. The larger model is checked
where FLASHD_QWEN_GGUF names Qwen2.5-Coder-1.5B-Instruct's file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from flashd.engine.decoding.text import TextTokenizer
from flashd.errors import DataError
from flashd.pack.sources import gguf_tokenizer
from flashd.pack.sources.gguf import GgufModel
from flashd.pack.vocabulary import byte_level_bytes
from tests import tiny

GOLDEN = json.loads((Path(__file__).parent / "data" / "token_ids.json").read_text("utf-8"))

PIECES = json.loads((Path(__file__).parent / "data" / "sentence_piece.json").read_text("utf-8"))


def check(path: Path, ids: list[int]) -> None:
    vocabulary = GgufModel(path).vocabulary()
    encoder = TextTokenizer(vocabulary.tokenizer_json, vocabulary.bos, vocabulary.add_bos)
    assert encoder.encode(GOLDEN["text"]) == ids
    spelled = b"".join(vocabulary.token_bytes[i] for i in ids).decode()
    controls = GOLDEN["text"].replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert spelled in (controls, controls.replace("e\u0301", "é"))


def test_smollm(smollm: Path) -> None:
    check(smollm, GOLDEN["smollm"])


@pytest.mark.skipif("FLASHD_QWEN_GGUF" not in os.environ, reason="FLASHD_QWEN_GGUF names no file")
def test_qwen2() -> None:
    # llama.cpp's ids of the text in NFC, to which Qwen's own tokenizer brings every text and llama.cpp none
    check(Path(os.environ["FLASHD_QWEN_GGUF"]), GOLDEN["qwen2"])


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    model = Changed(tiny.write(tmp_path / "m.gguf"), {"tokenizer.ggml.pre": "new"})
    with pytest.raises(DataError, match=r"'new' is not supported; --pre NAME .*known are .*llama-bpe.*qwen2.*smollm"):
        model.vocabulary()


@pytest.mark.parametrize(
    ("pre", "begins"),
    [("llama-bpe", True), ("falcon-h1", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)],
)
def test_a_token_begins_every_text_if_llama_cpp_takes_the_pre_tokenizer_for_such(
    tmp_path: Path, pre: str, begins: bool
) -> None:
    path = tiny.write(tmp_path / "m.gguf")
    assert Changed(path, {"tokenizer.ggml.pre": pre}).vocabulary().add_bos is begins
    stated = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": not begins}
    assert Changed(path, stated).vocabulary().add_bos is not begins


def test_end_tokens_are_found_by_number_and_by_name(smollm: Path) -> None:
    assert GgufModel(smollm).vocabulary().eos == [2, 0]


class Changed(GgufModel):
    """A file with some of its metadata changed."""

    def __init__(self, path: Path, changes: dict[str, Any]) -> None:
        self.changes = changes
        super().__init__(path)

    def metadata(self, key: str) -> Any:
        return self.changes.get(key, super().metadata(key))


@pytest.mark.parametrize("pre", GOLDEN["words"]["ids"])
def test_words_are_cut_as_llama_cpp_cuts_them(smollm: Path, pre: str) -> None:
    vocabulary = Changed(smollm, {"tokenizer.ggml.pre": pre}).vocabulary()
    encoder = TextTokenizer(vocabulary.tokenizer_json, None, False)
    assert encoder.encode(GOLDEN["words"]["text"]) == GOLDEN["words"]["ids"][pre]


def test_marks_stay_with_their_letters_in_qwen_3_5(smollm: Path) -> None:
    """With SmolLM2's merges, which the test above has, no token tells."""

    def cut(pre: str) -> list[tuple[int, int]]:
        made = Tokenizer.from_buffer(Changed(smollm, {"tokenizer.ggml.pre": pre}).vocabulary().tokenizer_json)
        return [where for _, where in made.pre_tokenizer.pre_tokenize_str("ax\u0301b !\u0301")]

    assert cut("qwen35") == [(0, 4), (4, 6), (6, 7)]
    assert cut("qwen2") == [(0, 2), (2, 4), (4, 7)]


@pytest.mark.parametrize("golden", PIECES["vocabularies"], ids=["llama", "gemma"])
def test_pieces_are_those_of_sentencepiece(smollm: Path, golden: dict[str, Any]) -> None:
    vocabulary = Changed(smollm, golden).vocabulary()
    encoder = TextTokenizer(vocabulary.tokenizer_json, None, False)
    for text, ids in zip(PIECES["texts"], golden["ids"], strict=True):
        assert encoder.encode(text) == ids
        spelled = b"".join(vocabulary.token_bytes[i] for i in ids).decode()
        assert spelled.replace("▁", " ").lstrip(" ") == text.replace("▁", " ").lstrip(" ")


def test_gemma_4_is_cut_as_llama_cpp_cuts_it(smollm: Path) -> None:
    """The numbers were made by llama-cpp-python 0.3.36 of a file with this vocabulary."""
    texts = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "\n\n\n", *(f"<0x{i:02X}>" for i in range(256))]
    texts += ["▁", "▁▁", "a", "b", "c", "d", "e", "h", "i", "n", "t", "th", "the", "▁the", "▁th", ",", "é", "<|turn>"]
    stated = {
        "model": "gemma4", "tokens": texts, "token_type": [3, 3, 3, 2, *[1] * 3, *[6] * 256, *[1] * 17, 4],
        "merges": ["\n \n", "\n\n \n", "▁ ▁", "t h", "th e", "▁ the", "▁ th"], "eos_token_id": 1, "bos_token_id": 2,
        "add_bos_token": True,
    }  # fmt: skip
    vocabulary = Changed(smollm, {f"tokenizer.ggml.{key}": value for key, value in stated.items()}).vocabulary()
    encoder = TextTokenizer(vocabulary.tokenizer_json, None, False)
    assert encoder.encode("the bath, the  the") == [275, 263, 266, 265, 274, 278, 276, 264, 275]
    assert encoder.encode("the\n\n\n\nthe \n a") == [275, 5, 5, 275, 263, 4, 263, 265]
    assert encoder.encode("thé héß  in") == [274, 279, 263, 270, 279, 202, 166, 264, 271, 272]
    assert encoder.encode("<|turn>the\nb<|turn>") == [280, 275, 4, 266, 280]
    assert vocabulary.add_bos and vocabulary.eos[0] == 1


@pytest.mark.parametrize(
    ("token", "spelled"), [("[THINK]", b"[THINK]"), ("</think>", b"</think>"), ("<|im_end|>", b"")]
)
def test_control_tokens_are_no_text_but_for_those_that_frame_thoughts(token: str, spelled: bytes) -> None:
    assert gguf_tokenizer._spelled(byte_level_bytes, token, gguf_tokenizer.CONTROL) == spelled
