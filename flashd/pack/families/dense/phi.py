"""Phi-2."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

DEFAULTS = {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048}

FAMILIES = (
    Family(
        "phi2", "Phi-2", "tiny",
        block="parallel", norm="layer", norms=("attention", "final"), gated=False, activation="gelu_tanh",
        biases=("qkv", "output", "inputs", "down"), may_have=("head",),
        folders=(Folder("phi", defaults=DEFAULTS),),
    ),
)  # fmt: skip
