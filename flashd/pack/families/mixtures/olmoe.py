"""OLMoE."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder, Mixture

DEFAULTS = {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}

FAMILIES = (
    Family(
        "olmoe", "OLMoE", "tiny",
        norms=("attention", "query", "key", "ffn", "final"), mixture=Mixture(normalised=False),
        folders=(Folder("olmoe", defaults=DEFAULTS),),
    ),
)  # fmt: skip
