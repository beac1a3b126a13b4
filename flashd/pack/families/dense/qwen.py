"""Qwen 2, 2.5 and 3, dense and as a mixture."""

from __future__ import annotations

from flashd.bundle.architecture import Place
from flashd.pack.families.family import Family, Folder, Mixture

QWEN_2 = {
    "use_sliding_window": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32,
}  # fmt: skip
QWEN_3 = {**QWEN_2, "head_dim": 128}
MIXTURE = {**QWEN_2, "num_key_value_heads": 4, "norm_topk_prob": False}
NORMS: tuple[Place, ...] = ("attention", "query", "key", "ffn", "final")

FAMILIES = (
    Family(
        "qwen2", "Qwen2, Qwen2.5", "Qwen2.5-Coder-1.5B, tiny",
        biases=("qkv",), folders=(Folder("qwen2", defaults=QWEN_2),),
    ),
    Family(
        "qwen3", "Qwen3", "tiny",
        norms=NORMS, may_have=("qkv", "output"), folders=(Folder("qwen3", defaults=QWEN_3),),
    ),
    Family(
        "qwen3moe", "Qwen3-MoE", "tiny", norms=NORMS, mixture=Mixture(),
        folders=(Folder("qwen3_moe", defaults=MIXTURE),),
    ),
)  # fmt: skip
