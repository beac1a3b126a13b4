"""Makes sentence_piece.json: two small SentencePiece vocabularies, and the sentencepiece package's token ids.

    pip install sentencepiece protobuf
    python -m tests.pack.data.make_token_ids

One is as Llama's are (a space before the text, digits apart), one as Gemma's (no such space; lines and runs of
spaces and of line ends that are tokens by decree). Neither flashd nor its tests need the package.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

HERE = Path(__file__).parent
TEXT = json.loads((HERE / "token_ids.json").read_text("utf-8"))["text"].partition("<|im_start|>")[0]
RUNS = [c * n for c in ("\n", "▁") for n in range(2, 9)] + ["<table>", "</table>", "\n"]
TEXTS = [
    TEXT, " x", "", "a  b   c    d", "\n\n\n\nif x:\n        y = 'z'\n", "<table>1 2</table>  0x1F",
    "\u00a0\u3000 नमस्ते สวัสดี 𝒳𐍈",
    "it's 100% done, isn't it?", "the the the there then them\tother",
]  # fmt: skip


def made(name: str, **options: Any) -> dict[str, Any]:
    corpus = (HERE.parent.parent / "data" / "prose.txt").read_text("utf-8").split("\n") + [TEXT] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=640, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2, **options,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = protocol.ModelProto.FromString(model.getvalue()).pieces
    return {
        "name": name,
        "tokenizer.ggml.model": "llama",
        # GGUF spells tokens by decree with spaces
        "tokenizer.ggml.tokens": [p.piece.replace("▁", " ") if p.type == p.USER_DEFINED else p.piece for p in pieces],
        "tokenizer.ggml.scores": [p.score for p in pieces],
        "tokenizer.ggml.token_type": [p.type for p in pieces],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.add_space_prefix": options.get("add_dummy_prefix", True),
        "ids": [processor.encode(text) for text in TEXTS],
    }


def main() -> None:
    vocabularies = [
        made("llama"),
        made("gemma", add_dummy_prefix=False, allow_whitespace_only_pieces=True, user_defined_symbols=RUNS),
    ]
    made_with = f"sentencepiece {sentencepiece.__version__}, make_token_ids.py"
    text = json.dumps({"made_with": made_with, "texts": TEXTS, "vocabularies": vocabularies}, ensure_ascii=False)
    (HERE / "sentence_piece.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
