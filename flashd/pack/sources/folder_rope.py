"""The rotary parameters of a Hugging Face folder, in the keys and the tensor that a GGUF file has for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashd.bundle.row_kinds import Floats
from flashd.pack.families.family import Config


def _rope(config: Config, layers: str = "full_attention") -> Config:
    """Rotary parameters, where they may differ between layers that see all tokens and those that see a window."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(stated.get(layers) or {}) if {"full_attention", "sliding_attention"} & set(stated) else dict(stated)


def rotary_keys(config: Config, head_dim: int) -> dict[str, Any]:
    rope, local = _rope(config), _rope(config, "sliding_attention")
    out: dict[str, Any] = {"rope.freq_base": rope.get("rope_theta", config.get("rope_theta"))}
    out["rope.freq_base_swa"] = config.get("rope_local_base_freq") or (
        local.get("rope_theta") if local != rope else None
    )
    if part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor")):
        out["rope.dimension_count"] = int(part * head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "llama3"):  # the second is in a tensor
        return out
    out |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.get("factor")}
    if kind == "yarn":
        out |= {
            "rope.scaling.original_context_length": rope.get(
                "original_max_position_embeddings", config.get("max_position_embeddings")
            ),
            "rope.scaling.attn_factor": rope.get("attention_factor"),
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    return out


def rope_divisors(config: Config, head_dim: int) -> Floats | None:
    """[D / 2] what Llama 3 divides the angle of each pair by, which GGUF keeps as `rope_freqs.weight`.

    Slow pairs by `factor`, fast ones not at all, by a smooth step between (transformers, modeling_rope_utils).
    Raises KeyError where a parameter is missing.
    """
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    half = head_dim // 2
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    turns = rope["original_max_position_embeddings"] * base ** (-np.arange(half) / half) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / (fast + (1 - fast) / rope["factor"]), np.float32)
