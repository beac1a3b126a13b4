"""Makes a GGUF file of Qwen3-30B-A3B's shape with random weights, to see how a mixture of experts pages.

    python -m tests.lab.mixture FILE.gguf [--layers 48] [--kind Q4_K] [--vocabulary 151936] [--seed 0]

All 48 layers are 17 GB. The blocks are drawn as they are in the file, so this takes as long as the disk. Not a test.

What it answers says nothing, but it answers as a real model does in three respects. A text never repeats itself: the
head makes each token be followed by the next of one ring of all tokens. The experts of a token differ from those of
the one before. If half of the experts are in RAM, 70 to 80 % of the uses find theirs there. For that a token's
embedding is a sum of three parts: one of its own; a topic, which changes slowly along the ring; and one that all
tokens share, which makes each router like some experts more than others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Kind

from tests import tiny

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Random = np.random.Generator

TOPIC, SHARED, TOPIC_STAYS = 0.5, 0.5, 0.9
"""Sizes of two parts of an embedding, if a token's own part has size 1, and how much of a topic stays."""

ROUTER_GAIN, OUTPUT_GAIN, DOWN_GAIN = 2.0, 0.1, 0.25
"""By how much these matrices lengthen a vector. A branch adds a twentieth to the hidden state, so 48 layers leave the
token's own part in it. A router's scores lie two around zero."""

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. The defaults are those of Qwen3-30B-A3B."""

    layers: int = 48
    vocabulary: int = 151936
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    experts: int = 128
    used: int = 8
    neurons: int = 768  # of an expert


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape, its type, and what makes its data when it is its turn."""

    shape: tuple[int, ...]
    kind: Kind
    data: Callable[[Random], npt.NDArray[np.generic]]


def write(path: Path, shape: Shape, kind: Kind = Kind.Q4_K, seed: int = 0) -> Path:
    """Writes the model, a tensor at a time. `kind` is Q4_K or Q4_0."""
    random = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "qwen3moe")
    _metadata(w, shape)
    write_tensors(w, _tensors(shape, kind, random), random)
    return path


def write_tensors(w: gguf.GGUFWriter, tensors: dict[str, Stored], random: Random) -> None:
    """Writes the file, whose metadata `w` knows, with these tensors. One at a time is in RAM."""
    for name, tensor in tensors.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        length = prod(tensor.shape) // block * nbytes
        w.add_tensor_info(name, tensor.shape, np.dtype(np.float32), length, raw_dtype=tensor.kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for tensor in tensors.values():
        w.write_tensor_data(tensor.data(random))
    w.close()


def follower(shape: Shape, seed: int = 0) -> npt.NDArray[np.int64]:
    """[V]: the token that follows each token."""
    ring = _ring(shape, np.random.default_rng(seed))
    out = np.empty_like(ring)
    out[ring] = np.roll(ring, -1)
    return out


def _ring(shape: Shape, random: Random) -> npt.NDArray[np.int64]:
    """[V]: all tokens in the order in which they follow each other. It is the first that is drawn."""
    return random.permutation(shape.vocabulary)


def _metadata(w: gguf.GGUFWriter, shape: Shape) -> None:
    w.add_name("random mixture")
    w.add_context_length(40960)
    w.add_embedding_length(shape.hidden)
    w.add_block_count(shape.layers)
    w.add_feed_forward_length(shape.used * shape.neurons)
    w.add_expert_feed_forward_length(shape.neurons)
    w.add_expert_count(shape.experts)
    w.add_expert_used_count(shape.used)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    w.add_key_length(shape.head_dim)
    w.add_value_length(shape.head_dim)
    w.add_rope_freq_base(1e6)
    w.add_layer_norm_rms_eps(1e-6)
    tiny.add_vocabulary(w, shape.vocabulary)


def _tensors(shape: Shape, kind: Kind, random: Random) -> dict[str, Stored]:
    """What is in the file, by its name, in its order."""
    s, ring = shape, _ring(shape, random)
    own = int(random.integers(1 << 32))  # so that embeddings and head draw the same
    tokens = (s.vocabulary, s.hidden)
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim

    def matrix(*shape: int, gain: float = 1.0) -> Stored:
        return Stored(shape, kind, lambda random: blocks(random, shape, kind, gain))

    def ones(length: int) -> Stored:
        return Stored((length,), Kind.F32, lambda random: np.ones(length, np.float32))

    def router(random: Random) -> Floats:
        return ROUTER_GAIN / np.float32(np.sqrt(s.hidden)) * random.standard_normal((s.experts, s.hidden), np.float32)

    out = {
        "token_embd.weight": Stored(tokens, Kind.Q4_0, lambda random: _embeddings(random, s, ring, own)),
        "output_norm.weight": ones(s.hidden),
        "output.weight": Stored(tokens, Kind.Q5_1, lambda random: _head(s, ring, own)),
    }
    for i in range(s.layers):
        layer = {
            "attn_norm": ones(s.hidden), "attn_q_norm": ones(s.head_dim), "attn_k_norm": ones(s.head_dim),
            "attn_q": matrix(query, s.hidden), "attn_k": matrix(key, s.hidden), "attn_v": matrix(key, s.hidden),
            "attn_output": matrix(s.hidden, query, gain=OUTPUT_GAIN),
            "ffn_norm": ones(s.hidden), "ffn_gate_inp": Stored((s.experts, s.hidden), Kind.F32, router),
            "ffn_gate_exps": matrix(s.experts, s.neurons, s.hidden),
            "ffn_up_exps": matrix(s.experts, s.neurons, s.hidden),
            "ffn_down_exps": matrix(s.experts, s.hidden, s.neurons, gain=DOWN_GAIN),
        }  # fmt: skip
        out |= {f"blk.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return out


def _own(shape: Shape, seed: int) -> Iterator[tuple[slice, Floats]]:
    """The parts of embeddings that are the tokens' own: (places on the ring, [n, H])."""
    random = np.random.default_rng(seed)
    for at in range(0, shape.vocabulary, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, shape.vocabulary - at)
        yield slice(at, at + n), random.standard_normal((n, shape.hidden), np.float32)


def _embeddings(random: Random, shape: Shape, ring: npt.NDArray[np.int64], own: int) -> Bytes:
    """The table of embeddings as Q4_0."""
    shared = np.float32(SHARED) * random.standard_normal(shape.hidden, np.float32)
    topic = random.standard_normal(shape.hidden, np.float32)
    fresh = np.float32(np.sqrt(1 - TOPIC_STAYS**2))
    out: Bytes | None = None
    for places, rows in _own(shape, own):
        for row in rows:
            topic = np.float32(TOPIC_STAYS) * topic + fresh * random.standard_normal(shape.hidden, np.float32)
            row += np.float32(TOPIC) * topic + shared
        out = _put(out, shape, ring[places], gguf.quantize(rows, Kind.Q4_0))
    assert out is not None
    return out


def _head(shape: Shape, ring: npt.NDArray[np.int64], own: int) -> Bytes:
    """The head as Q5_1: a token's row is like the own part of the token in front of it."""
    out: Bytes | None = None
    for places, rows in _own(shape, own):
        rows /= np.float32(np.sqrt(shape.hidden))
        out = _put(out, shape, np.roll(ring, -1)[places], gguf.quantize(rows, Kind.Q5_1))
    assert out is not None
    return out


def _put(out: Bytes | None, shape: Shape, tokens: npt.NDArray[np.int64], rows: Bytes) -> Bytes:
    """Puts the rows of some tokens into a table, which is made at first."""
    if out is None:
        out = np.empty((shape.vocabulary, rows.shape[1]), np.uint8)
    out[tokens] = rows
    return out


def blocks(random: Random, shape: tuple[int, ...], kind: Kind, gain: float) -> Bytes:
    """Random blocks of weights around zero. A vector that is multiplied by them becomes `gain` times as long.

    `kind` is Q4_0, Q4_K or Q6_K.
    """
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.frombuffer(bytearray(random.bytes(prod(shape) // block * nbytes)), np.uint8).reshape(-1, nbytes)
    # of the whole numbers from 0 to 63, or to 15
    spread = np.float32(np.sqrt(341.25 if kind == Kind.Q6_K else 21.25))
    step = np.float32(gain / np.sqrt(shape[-1])) / spread
    if kind == Kind.Q4_0:
        # half of the steps are below zero, since whole numbers from -8 to 7 are not around zero
        varied = step * random.uniform(0.75, 1.25, len(out)).astype(np.float32) * random.choice([-1, 1], len(out))
        out[:, :2] = varied.astype(np.float16).view(np.uint8).reshape(-1, 2)
    elif kind == Kind.Q4_K:
        # codes of scales are 32 to 63, the code of a minimum is that of its scale, and a minimum is 7.5 steps
        halves = np.array([step / 48, 7.5 * step / 48], np.float16).view(np.uint8)
        low = out[:, 4:8] & 31 | 32, out[:, 8:12] & 31 | 32  # the codes of blocks 0 to 3, and of blocks 4 to 7
        out[:, :4] = halves
        out[:, 4:8] = out[:, 8:12] = low[0] | (low[1] & 48) << 2
        out[:, 12:16] = low[1] & 15 | (low[1] & 15) << 4
    elif kind == Kind.Q6_K:
        scales = out[:, 192:208]  # of 16 weights: 32 to 63, half of them below zero
        scales[:] = np.where(scales & 128, -(scales & 31 | 32), scales & 31 | 32)
        out[:, 208:] = np.array([step / 48], np.float16).view(np.uint8)
    else:
        raise ValueError(f"blocks of {kind.name}; there are Q4_0, Q4_K and Q6_K")
    return out.reshape(gguf.quant_shape_to_byte_shape(shape, kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--kind", choices=["Q4_K", "Q4_0"], default="Q4_K")
    parser.add_argument("--vocabulary", type=int, default=Shape.vocabulary, help="tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.file, Shape(layers=args.layers, vocabulary=args.vocabulary), Kind[args.kind], args.seed)


if __name__ == "__main__":
    main()
