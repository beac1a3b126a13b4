"""Makes Gemma 4 E4B's shape with random weights, to see how a model whose largest table stays on the card pages.

    python -m tests.lab.e4b FOLDER           a Hugging Face folder in bfloat16, 15 GB
    python -m tests.lab.e4b FILE.gguf        the same shape for llama.cpp, Q4_0 and its head Q6_K, 4.5 GB

The sizes are those of the public config.json of google/gemma-4-E4B, its text part. Both files have the matrices of
keys and values that no layer uses, too, as the real ones. The weights are not the same in both. Not a test.

A text says nothing, but it does not repeat itself, so no draft of it is right. For that each layer halves what came
before: behind the last one nothing is left of a token's own embedding, which would else make it say itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Kind

from tests import tiny
from tests.lab.llama7b import Drawn, Shapes, write_shards, write_tokenizer
from tests.lab.mixture import Stored, blocks, write_tensors

Floats = npt.NDArray[np.float32]
Random = np.random.Generator

KEY_GAIN, LAYER_SCALE = 0.25, 0.5
"""Numbers of a normed key, and what a layer's output is multiplied by."""

WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. The defaults are those of Gemma 4 E4B."""

    layers: int = 42
    vocabulary: int = 262144
    hidden: int = 2560
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 256  # of layers with a window
    wide: int = 512  # and that of the others
    every: int = 6  # layers, of which the last has no window
    window: int = 512
    neurons: int = 10240
    said: int = 256  # numbers that a token says to each layer
    borrowing: int = 18  # last layers, which look at keys and values of earlier ones

    def full(self, layer: int) -> bool:
        """Whether a layer has no window."""
        return (layer + 1) % self.every == 0


@dataclass(frozen=True)
class Weights:
    """A tensor, by its name in a GGUF file."""

    shape: tuple[int, ...]
    gain: float = 1.0  # of a matrix: how much longer a vector is that it is multiplied by. Of a vector: its numbers.
    name: str = ""  # in a folder, below the model or the layer


def tensors(shape: Shape) -> dict[str, Weights]:
    """All of them, in the order of both files. `rope_freqs` is not among them: only a GGUF file has it."""
    s, rows = shape, shape.layers * shape.said
    out = {
        "token_embd.weight": Weights((s.vocabulary, s.hidden), 1, "embed_tokens.weight"),
        # so that a token says numbers around 1 to each layer
        "per_layer_token_embd.weight": Weights((s.vocabulary, rows), sqrt(s.layers), "embed_tokens_per_layer.weight"),
        "per_layer_model_proj.weight": Weights((rows, s.hidden), 1, "per_layer_model_projection.weight"),
        "per_layer_proj_norm.weight": Weights((s.said,), 1, "per_layer_projection_norm.weight"),
        "output_norm.weight": Weights((s.hidden,), 1, "norm.weight"),
    }
    for i in range(s.layers):
        out |= {
            f"blk.{i}.{name}.weight": part for name, part in _layer(s, s.wide if s.full(i) else s.head_dim).items()
        }
    return out


def _layer(s: Shape, head_dim: int) -> dict[str, Weights]:
    query, key, ffn = s.heads * head_dim, s.kv_heads * head_dim, (s.neurons, s.hidden)
    return {
        "attn_norm": Weights((s.hidden,), 1, "input_layernorm.weight"),
        "attn_q": Weights((query, s.hidden), 1, "self_attn.q_proj.weight"),
        "attn_k": Weights((key, s.hidden), 1, "self_attn.k_proj.weight"),
        "attn_v": Weights((key, s.hidden), 1, "self_attn.v_proj.weight"),
        "attn_q_norm": Weights((head_dim,), 1, "self_attn.q_norm.weight"),
        "attn_k_norm": Weights((head_dim,), KEY_GAIN, "self_attn.k_norm.weight"),
        "attn_output": Weights((s.hidden, query), 1, "self_attn.o_proj.weight"),
        "post_attention_norm": Weights((s.hidden,), 1, "post_attention_layernorm.weight"),
        "ffn_norm": Weights((s.hidden,), 1, "pre_feedforward_layernorm.weight"),
        "ffn_gate": Weights(ffn, 1, "mlp.gate_proj.weight"),
        "ffn_up": Weights(ffn, 1, "mlp.up_proj.weight"),
        "ffn_down": Weights(ffn[::-1], 1, "mlp.down_proj.weight"),
        "post_ffw_norm": Weights((s.hidden,), 1, "post_feedforward_layernorm.weight"),
        "inp_gate": Weights((s.said, s.hidden), 1, "per_layer_input_gate.weight"),
        "proj": Weights((s.hidden, s.said), 1, "per_layer_projection.weight"),
        "post_norm": Weights((s.hidden,), 1, "post_per_layer_input_norm.weight"),
        "layer_output_scale": Weights((1,), LAYER_SCALE, "layer_scalar"),
    }


def write_folder(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes the folder, a shard a layer, a few mebibytes at a time."""
    folder.mkdir()
    shards: dict[str, dict[str, Weights]] = {}
    for name, part in tensors(shape).items():
        _, layer, *_ = name.split(".") if name.startswith("blk.") else ("", "")
        before = f"model.language_model.{f'layers.{layer}.' if layer else ''}"
        shards.setdefault(layer, {})[f"{before}{part.name}"] = part
    write_shards(folder, [_shard(parts, (seed, number)) for number, parts in enumerate(shards.values(), 1)])
    (folder / "config.json").write_text(json.dumps(config(shape)))
    _write_tokenizer(folder, shape)
    return folder


def _shard(parts: dict[str, Weights], seed: tuple[int, int]) -> tuple[Shapes, Drawn]:
    random = np.random.default_rng(seed)
    return {name: part.shape for name, part in parts.items()}, (_drawn(part, random) for part in parts.values())


def _drawn(part: Weights, random: Random) -> Iterator[Floats]:
    """A tensor's weights, some rows at a time."""
    if len(part.shape) == 1:
        yield np.full(part.shape, part.gain, np.float32)
        return
    rows, width = part.shape
    size, at_once = np.float32(part.gain / sqrt(width)), max(1, WEIGHTS_AT_ONCE // width)
    for at in range(0, rows, at_once):
        yield size * random.standard_normal((min(at_once, rows - at), width), np.float32)


def config(shape: Shape) -> dict[str, Any]:
    """The folder's config.json, as Gemma 4's are: the text part inside that of a model that sees and hears."""
    s = shape
    text = {
        "model_type": "gemma4_text", "hidden_size": s.hidden, "num_hidden_layers": s.layers, "head_dim": s.head_dim,
        "global_head_dim": s.wide, "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
        "intermediate_size": s.neurons, "hidden_size_per_layer_input": s.said, "num_kv_shared_layers": s.borrowing,
        "vocab_size": s.vocabulary, "vocab_size_per_layer_input": s.vocabulary, "sliding_window": s.window,
        "layer_types": [f"{'full' if s.full(i) else 'sliding'}_attention" for i in range(s.layers)],
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "use_double_wide_mlp": False,
        "attention_k_eq_v": False, "enable_moe_block": False, "attention_bias": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
    }  # fmt: skip
    seeing = {"model_type": "gemma4_vision"}  # by which the text's tensors are model.language_model's
    return {
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "text_config": text,
        "vision_config": seeing,
    }  # fmt: skip


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """That of the GGUF file, from one with a narrow table and no layers."""
    table = np.zeros((shape.vocabulary, 1), np.float32)
    with tempfile.TemporaryDirectory() as other:
        path = Path(other) / "m.gguf"
        stored = {"token_embd.weight": Stored(table.shape, Kind.F32, lambda _: table)}
        write_tensors(_metadata(path, shape), stored, np.random.default_rng(0))
        write_tokenizer(folder, path)


def write_gguf(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes the GGUF file, a tensor at a time. The blocks are drawn as they are in the file."""
    random = np.random.default_rng(seed)
    turned = np.where(np.arange(shape.wide // 2) < shape.wide // 8, 1, 1e30).astype(np.float32)
    stored = {"rope_freqs.weight": Stored(turned.shape, Kind.F32, lambda _: turned)}
    stored |= {name: _stored(name, part) for name, part in tensors(shape).items()}
    write_tensors(_metadata(path, shape), stored, random)
    return path


def _stored(name: str, part: Weights) -> Stored:
    if len(part.shape) == 1:
        return Stored(part.shape, Kind.F32, lambda _: np.full(part.shape, part.gain, np.float32))
    kind = Kind.Q6_K if name == "token_embd.weight" else Kind.Q4_0  # as llama.cpp rounds a table that is the head too
    return Stored(part.shape, kind, lambda random: blocks(random, part.shape, kind, part.gain))


def _metadata(path: Path, shape: Shape) -> gguf.GGUFWriter:
    s, w = shape, gguf.GGUFWriter(path, "gemma4")
    w.add_name("random E4B")
    keys = {
        "context_length": 131072, "embedding_length": s.hidden, "block_count": s.layers,
        "feed_forward_length": s.neurons, "embedding_length_per_layer_input": s.said,
        "attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads, "attention.key_length": s.wide,
        "attention.value_length": s.wide, "attention.key_length_swa": s.head_dim,
        "attention.value_length_swa": s.head_dim, "attention.shared_kv_layers": s.borrowing,
        "attention.sliding_window": s.window,
        "attention.sliding_window_pattern": [not s.full(i) for i in range(s.layers)],
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
        "rope.dimension_count": s.wide, "rope.dimension_count_swa": s.head_dim, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    for key, value in keys.items():
        tiny.add_key(w, f"gemma4.{key}", value)
    tiny.add_vocabulary(w, s.vocabulary)
    return w


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, metavar="FOLDER|FILE.gguf")
    parser.add_argument("--layers", type=int, default=Shape.layers, help="a multiple of 6 (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=Shape.vocabulary, help="tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    borrowing = min(Shape.borrowing, args.layers - Shape.every)
    shape = Shape(layers=args.layers, vocabulary=args.vocabulary, borrowing=borrowing)
    (write_gguf if args.path.suffix == ".gguf" else write_folder)(args.path, shape, args.seed)


if __name__ == "__main__":
    main()
