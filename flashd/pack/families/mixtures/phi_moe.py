"""Phi-3.5-MoE: experts weighed by SparseMixer, layer norms, LongRoPE with a length of its own.

Source: transformers' modeling_phimoe.py. llama.cpp takes a softmax of the two experts, and root mean square norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.dense import phi
from flashd.pack.families.family import Config, Family, Folder, Mixture

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6,
    "num_local_experts": 16, "num_experts_per_tok": 2, "intermediate_size": 6400, "router_jitter_noise": 0.01,
}  # fmt: skip


def adapt(config: Config, path: Path) -> Config:
    """The configuration with the length that LongRoPE makes queries and keys, by the name of other families."""
    full: dict[str, Any] = dict(phi.adapt(config, path))
    for key in ("rope_parameters", "rope_scaling"):
        rope = full.get(key)
        if isinstance(rope, dict) and "short_mscale" in rope:
            rope = dict(rope)
            short, long = rope.pop("short_mscale"), rope.pop("long_mscale", None)
            if long not in (None, short):
                raise DataError(f"{path}: LongRoPE of another length in long texts (long_mscale) is not supported")
            full[key] = {**rope, "attention_factor": short}
    return full


FAMILIES = (
    Family(
        "phimoe", "Phi-3.5-MoE", "tiny",
        norm="layer", other_epsilon=True, may_have=("qkv", "output", "head"),
        mixture=Mixture(normalised=False, scores="sparsemixer"), reads=("router_jitter_noise",),
        folders=(
            Folder(
                "phimoe", adapt=adapt, defaults=DEFAULTS,
                keys={"router_jitter_noise": "router_jitter_noise"},
            ),
        ),
    ),
)  # fmt: skip
