"""OLMoE."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder, Mixture

FAMILIES = (
    Family(
        "olmoe", "OLMoE", "tiny",
        norms=("attention", "query", "key", "ffn", "final"), mixture=Mixture(normalised=False),
        folders=(Folder("olmoe", defaults={"norm_topk_prob": False}),),
    ),
)  # fmt: skip
