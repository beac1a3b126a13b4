"""The rotary parameters of a Hugging Face folder, in the keys and the tensor that a GGUF file has for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.pack.families.family import Config
from flashd.pack.families.rope import LONG, SHORT, yarn_length

COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
PARAMETERS: dict[str, set[str]] = {
    "default": set(),
    "proportional": set(),
    "linear": {"factor"},
    # it stretches only what is longer than max_position_embeddings, and flashd's context never is
    "dynamic": {"factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    },
}  # fmt: skip
"""The kinds of rotary scaling that are supported, and the parameters that each may have beside the common ones."""


UNTURNED = 1e30
"""The divisor of a pair that is not turned."""


def _rope(config: Config, layers: str = "full_attention") -> Config:
    """Rotary parameters, which may differ between layers that see all tokens and those that see a window."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    own = stated.get(layers) or {} if {"full_attention", "sliding_attention"} & set(stated) else stated
    return {key: value for key, value in own.items() if value is not None}


def _kind(rope: Config) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def unknown_rope(config: Config) -> list[str]:
    """The kinds of rotary scaling, and the parameters of them, that are not supported, in words."""
    rope, local = _rope(config), _rope(config, "sliding_attention")
    out = []
    for parameters in (rope, local) if local != rope else (rope,):
        if (kind := _kind(parameters)) not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            out.append(f"rotary scaling of kind {kind!r} is not supported; known are {known}")
        for name in sorted(set(parameters) - COMMON - PARAMETERS.get(kind, set(parameters))):
            out.append(f"flashd does not know the rotary parameter {name!r} of kind {kind!r}")
    if local != rope and _kind(local) in set(PARAMETERS) - {"default"}:
        out.append(f"rotary scaling ({_kind(local)}) of layers that see a window is not supported")
    return out


def rotary_keys(config: Config, head_dim: int) -> dict[str, Any]:
    """GGUF's keys. Raises KeyError if a parameter is missing."""
    rope, local = _rope(config), _rope(config, "sliding_attention")
    out: dict[str, Any] = {"rope.freq_base": rope.get("rope_theta", config.get("rope_theta"))}
    out["rope.freq_base_swa"] = config.get("rope_local_base_freq") or (
        local.get("rope_theta") if local != rope else None
    )
    kind = _kind(rope)
    if kind != "proportional" and (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))):
        out["rope.dimension_count"] = int(part * head_dim)
    if kind == "linear":
        return out | {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "longrope":
        return out | _long_keys(config, rope)
    return out | (_yarn_keys(config, rope) if kind == "yarn" else {})  # llama3 is in a tensor


def _long_keys(config: Config, rope: Config) -> dict[str, Any]:
    """LongRoPE's; its divisors are in tensors. The length is that of arXiv 2402.13753."""
    trained = _trained(config, rope)
    factor = rope.get("factor") or config["max_position_embeddings"] / trained
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": trained,
        "rope.scaling.attn_factor": rope.get("attention_factor") or usual,
    }


def _yarn_keys(config: Config, rope: Config) -> dict[str, Any]:
    trained = _trained(config, rope)
    factor = rope.get("factor") or config["max_position_embeddings"] / trained
    mscale, all_dim, length = rope.get("mscale"), rope.get("mscale_all_dim"), rope.get("attention_factor")
    if length is None and mscale and all_dim:
        length = yarn_length(factor, mscale) / yarn_length(factor, all_dim)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": trained,
        "rope.scaling.attn_factor": None if length is None else length / yarn_length(factor),
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast") or None,
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow") or None,
        "rope.scaling.yarn_truncate": rope.get("truncate"),  # GGUF has no key for it
    }


def _trained(config: Config, rope: Config) -> int:
    """The tokens of the first training."""
    stated = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(stated or config["max_position_embeddings"])


def rope_divisors(config: Config, head_dim: int) -> dict[str, Floats]:
    """What the angle of each pair is divided by, each [D / 2], by the names of GGUF's tensors.

    Gemma 4 has the pairs of a whole head (proportional), and the slow ones are not turned: that is the divisor that
    GGUF files have for them. Llama 3 divides slow pairs by `factor`, fast ones not at all, by a smooth step between
    (transformers, modeling_rope_utils). LongRoPE states all divisors. Raises KeyError if a parameter is missing.
    """
    rope = _rope(config)
    if _kind(rope) == "longrope":
        stated = {LONG: rope["long_factor"], SHORT: rope["short_factor"]}
        return {name: np.asarray(factors, np.float32) for name, factors in stated.items()}
    if _kind(rope) == "proportional":
        turned = int(rope.get("partial_rotary_factor", 1.0) * head_dim) // 2
        return {"rope_freqs.weight": np.where(np.arange(head_dim // 2) < turned, 1, UNTURNED).astype(np.float32)}
    if _kind(rope) != "llama3":
        return {}
    half = int(head_dim * rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) // 2
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    turns = _trained(config, rope) * base ** (-np.arange(half) / half) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": np.asarray(1 / (fast + (1 - fast) / rope["factor"]), np.float32)}
