"""Qwen 2, 2.5 and 3, dense and as a mixture."""

from __future__ import annotations

from flashd.bundle.architecture import Place
from flashd.pack.families.family import Family, Folder, Mixture

NO_WINDOW = {"use_sliding_window": False}
NORMS: tuple[Place, ...] = ("attention", "query", "key", "ffn", "final")

FAMILIES = (
    Family(
        "qwen2", "Qwen2, Qwen2.5", "Qwen2.5-Coder-1.5B, tiny",
        biases=("qkv",), folders=(Folder("qwen2", defaults=NO_WINDOW),),
    ),
    Family("qwen3", "Qwen3", "tiny", norms=NORMS, folders=(Folder("qwen3", defaults=NO_WINDOW),)),
    Family(
        "qwen3moe", "Qwen3-MoE", "tiny", norms=NORMS, mixture=Mixture(),
        folders=(Folder("qwen3_moe", defaults={**NO_WINDOW, "norm_topk_prob": False}),),
    ),
)  # fmt: skip
