"""StableLM 3B and StableLM 2."""

from __future__ import annotations

from dataclasses import replace

from flashd.pack.families.family import Family, Folder

DEFAULTS = {
    "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_key_value_heads": 32,
}  # fmt: skip

TWO_NORMS = Family("stablelm", "StableLM", "tiny", norm="layer", may_have=("qkv",))
ONE_NORM = replace(
    TWO_NORMS, block="parallel", norms=("attention", "final"), variant=("blk.0.ffn_norm.weight", TWO_NORMS),
    folders=(Folder("stablelm", defaults=DEFAULTS),),
)  # fmt: skip

FAMILIES = (ONE_NORM,)
