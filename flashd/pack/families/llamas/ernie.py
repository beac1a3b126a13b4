"""ERNIE 4.5, dense: a Llama whose folder, too, has rotary pairs side by side."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128,
    "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip

FAMILIES = (
    Family(
        "ernie4_5", "ERNIE 4.5, dense", "tiny",
        permuted=True, may_have=("qkv", "output", "inputs", "down"),
        folders=(Folder("ernie4_5", defaults=DEFAULTS),),
    ),
)  # fmt: skip
