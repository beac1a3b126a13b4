"""Hunyuan, dense: a Llama that norms queries and keys when they have been turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def adapt(config: Config, path: Path) -> Config:
    """The scaling that it calls dynamic, which is fixed: a larger rotary base."""
    full: dict[str, Any] = dict(config)
    key = "rope_parameters" if full.get("rope_parameters") else "rope_scaling"
    rope = full.get(key) or {}
    if not rope.get("alpha"):
        return full
    width = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    if rope.get("rope_type", rope.get("type")) != "dynamic" or width < 4:
        raise DataError(f"{path}: a rotary scaling with alpha that is not dynamic is not supported")
    base = rope.get("rope_theta", full.get("rope_theta", 10000.0))
    full[key] = {"rope_type": "default", "rope_theta": base * rope["alpha"] ** (width / (width - 2))}
    return full


FAMILIES = (
    Family(
        "hunyuan-dense", "Hunyuan, dense", "tiny",
        norms=("attention", "query", "key", "ffn", "final"), norm_turned=True,
        folders=(Folder("hunyuan_v1_dense", adapt=adapt, defaults=DEFAULTS),),
    ),
)  # fmt: skip
