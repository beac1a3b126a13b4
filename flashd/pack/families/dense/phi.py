"""Phi-2, and Phi-3 with what follows it: Phi-3.5-mini, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.pack.families.family import Config, Family, Folder

PHI_2 = {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048}
PHI_3 = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def adapt(config: Config, path: Path) -> Config:  # noqa: ARG001
    """The older names of LongRoPE, as transformers understands them in this family."""
    full: dict[str, Any] = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        rope = full.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            full[key] = {**rope, "rope_type": "longrope"}
    return full


FAMILIES = (
    Family(
        "phi2", "Phi-2", "tiny",
        block="parallel", norm="layer", norms=("attention", "final"), gated=False, activation="gelu_tanh",
        biases=("qkv", "output", "inputs", "down"), may_have=("head",),
        folders=(Folder("phi", defaults=PHI_2),),
    ),
    Family(
        "phi3", "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini", "tiny",
        joined_inputs=True, folders=(Folder("phi3", adapt=adapt, defaults=PHI_3),),
    ),
)  # fmt: skip
