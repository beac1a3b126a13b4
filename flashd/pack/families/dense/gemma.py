"""Gemma 1, 2 and 3."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256,
    "max_position_embeddings": 8192,
}  # fmt: skip
GEMMA_2 = {**DEFAULTS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256}
GEMMA_3 = {**GEMMA_2, "max_position_embeddings": 131072, "num_attention_heads": 8, "rope_theta": 1e6}

FAMILIES = (
    Family(
        "gemma", "Gemma", "tiny",
        activation="gelu_tanh", scaled_embeddings=True,
        folders=(Folder("gemma", shift=1.0, defaults={**DEFAULTS, "num_key_value_heads": 16}),),
    ),
    Family(
        "gemma2", "Gemma 2", "tiny",
        activation="gelu_tanh", scaled_embeddings=True, global_every=2, scale_by_width=(46,),
        norms=("attention", "attention_branch", "ffn", "ffn_branch", "final"),
        folders=(Folder("gemma2", shift=1.0, defaults=GEMMA_2),),
    ),
    Family(
        "gemma3", "Gemma 3", "Gemma-3-270M, tiny",
        activation="gelu_tanh", scaled_embeddings=True, global_every=6, local_base=10000.0, scale_by_width=(62,),
        norms=("attention", "query", "key", "attention_branch", "ffn", "ffn_branch", "final"),
        folders=(Folder("gemma3_text", seeing=("gemma3",), shift=1.0, defaults=GEMMA_3),),
    ),
)  # fmt: skip
