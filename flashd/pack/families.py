"""One table an architecture: where its tensors are and how they are to be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashd.bundle.layout import Model
from flashd.bundle.rows import BLOCK
from flashd.errors import DataError
from flashd.pack.source import Source


@dataclass(frozen=True)
class Family:
    """What differs from one llama-like architecture to the next."""

    architecture: str
    permuted: bool  # GGUF keeps llama's q and k rows in rotary pairs (2i, 2i + 1) and others' in halves
    qkv_bias: bool
    activation: str = "silu"


FAMILIES = {
    f.architecture: f
    for f in (
        Family("llama", permuted=True, qkv_bias=False),
        Family("qwen2", permuted=False, qkv_bias=True),
    )
}

UNSUPPORTED_KEYS = {
    "expert_count": "a mixture of experts",
    "rope.scaling.type": "rotary scaling",
    "attention.sliding_window": "a sliding window",
}


def family_of(source: Source) -> Family:
    """The family of a model file. Raises DataError naming the families that are supported."""
    known = ", ".join(sorted(FAMILIES))
    family = FAMILIES.get(source.architecture)
    if family is None:
        raise DataError(f"{source.path}: architecture {source.architecture!r} is not supported; known are {known}")
    for key, what in UNSUPPORTED_KEYS.items():
        name = f"{source.architecture}.{key}"
        if source.metadata(name) not in (None, 0, "none"):
            raise DataError(f"{source.path}: {what} ({name}) is not supported for {source.architecture!r} yet")
    unknown = source.names - expected_tensors(family, source.number("block_count", int))
    if unknown:
        raise DataError(
            f"{source.path}: tensor {min(unknown)!r} has no place in {source.architecture!r} as flashd knows it"
        )
    return family


def expected_tensors(family: Family, layers: int) -> set[str]:
    names = {"token_embd.weight", "output_norm.weight", "output.weight"}
    parts = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ]
    for i in range(layers):
        names |= {f"blk.{i}.{part}.weight" for part in parts}
        if family.qkv_bias:
            names |= {f"blk.{i}.{part}.bias" for part in ("attn_q", "attn_k", "attn_v")}
    return names


def model_of(source: Source, family: Family) -> Model:
    """The hyper-parameters of a model file. Raises DataError where one is missing or does not fit."""
    heads = source.number("attention.head_count", int)
    hidden = source.number("embedding_length", int)
    if heads < 1 or hidden < 1:
        raise DataError(f"{source.path}: {heads} heads and a hidden size of {hidden} make no model")
    head_dim = source.number("attention.key_length", int, hidden // heads)
    rotary = source.number("rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        raise DataError(f"{source.path}: partial rotary ({rotary} of {head_dim}) is not supported yet")
    for name, width in (("hidden size", hidden), ("width of all heads", heads * head_dim)):
        if width % BLOCK:
            raise DataError(f"{source.path}: {name} {width} is not a multiple of {BLOCK}")
    neurons = source.number("feed_forward_length", int)
    return Model(
        family=family.architecture,
        name=source.text("general.name") if source.has("general.name") else source.path.stem,
        hidden=hidden,
        layers=source.number("block_count", int),
        heads=heads,
        kv_heads=source.number("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        neurons=-(-neurons // BLOCK) * BLOCK,
        vocabulary=source.tensor("token_embd.weight").shape[0],
        context=source.number("context_length", int),
        rope_base=source.number("rope.freq_base", float, 10000.0),
        norm_epsilon=source.number("attention.layer_norm_rms_epsilon", float),
        activation=family.activation,
        qkv_bias=family.qkv_bias,
    )


def rotary_order(family: Family, heads: int, head_dim: int) -> npt.NDArray[np.int64] | None:
    """For each row as the engine wants it (halves), the row of the file that holds it; None where they agree."""
    if not family.permuted:
        return None
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
