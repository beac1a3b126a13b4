"""Nemotron and Minitron."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

DEFAULTS = {"partial_rotary_factor": 0.5, "norm_eps": 1e-5, "max_position_embeddings": 4096}

FAMILIES = (
    Family(
        "nemotron", "Nemotron, Minitron", "tiny",
        norm="layer", gated=False, activation="relu2", may_have=("qkv", "output", "inputs", "down"),
        folders=(Folder("nemotron", shift=1.0, defaults=DEFAULTS),),
    ),
)  # fmt: skip
