"""Makes a Hugging Face folder of Llama 2 7B's shape with random weights, to see how packing and paging scale.

    python -m tests.lab.llama7b FOLDER [LAYERS]

13.5 GB of BF16 with all 32 layers, a shard a layer, written a few mebibytes at a time: each matrix repeats one
random block, moved on a little from row to row so that no two rows are alike. Not a test; what answers with these
weights says nothing, but every byte of it is read, kept and multiplied as a real model's would be.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashd.pack.sources.gguf import GgufModel
from tests import tiny

HIDDEN, NEURONS, HEADS, VOCABULARY, LAYERS = 4096, 11008, 32, 32000, 32
ROWS_AT_ONCE = 512

Shapes = dict[str, tuple[int, ...]]
Drawn = Iterable[Iterable[npt.NDArray[np.float32]]]


def layer_shapes(i: int) -> Shapes:
    at = f"model.layers.{i}."
    square = {f"{at}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
    norms = {f"{at}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    inputs = {f"{at}mlp.{part}_proj.weight": (NEURONS, HIDDEN) for part in ("gate", "up")}
    return {**square, **norms, **inputs, f"{at}mlp.down_proj.weight": (HIDDEN, NEURONS)}


OUTSIDE: Shapes = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "lm_head.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
}


def write(folder: Path, layers: int = LAYERS) -> None:
    folder.mkdir()
    parts = [OUTSIDE, *(layer_shapes(i) for i in range(layers))]
    drawn = [[values(shape, 1000 * i + j) for j, shape in enumerate(p.values())] for i, p in enumerate(parts)]
    write_shards(folder, list(zip(parts, drawn, strict=True)))
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "intermediate_size": NEURONS, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, tiny.write(folder / "tiny.gguf"))
    (folder / "tiny.gguf").unlink()


def write_tokenizer(folder: Path, model: Path) -> None:
    """That of a GGUF file made by tests.tiny."""
    vocabulary = GgufModel(model).vocabulary()
    (folder / "tokenizer.json").write_bytes(vocabulary.tokenizer_json)
    special = {"eos_token": "<|end|>", "chat_template": vocabulary.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_shards(folder: Path, shards: Sequence[tuple[Shapes, Drawn]]) -> None:
    """The weights of a folder and their index: of each shard its tensors, and their weights as write_shard wants."""
    where: dict[str, str] = {}
    for number, (shapes, drawn) in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shapes, drawn)
        where |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def write_shard(path: Path, shapes: Shapes, drawn: Drawn) -> None:
    """A safetensors file: the length of its header, the header, the tensors one after the other.

    `drawn` are the weights of each, some rows at a time.
    """
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    stated = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(stated)) + stated)
        for parts in drawn:
            for part in parts:
                file.write(part.astype(ml_dtypes.bfloat16).tobytes())


def values(shape: tuple[int, ...], seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """The weights of a matrix, some rows at a time; of a vector, ones."""
    if len(shape) == 1:
        yield np.ones(shape, np.float32)
        return
    block = np.random.default_rng(seed).standard_normal((ROWS_AT_ONCE, shape[1]), np.float32) / np.sqrt(shape[1])
    for at in range(0, shape[0], ROWS_AT_ONCE):
        yield np.roll(block, 7 * at // ROWS_AT_ONCE + 1, axis=1)[: shape[0] - at]


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
