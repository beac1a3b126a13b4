"""BitNet b1.58, whose GGUF files name the architecture in two ways."""

from __future__ import annotations

from dataclasses import replace

from flashd.pack.families.family import Family, Folder

DEFAULTS = {
    "hidden_act": "relu2", "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "num_key_value_heads": 5,
}  # fmt: skip
TENSORS = {
    "model.layers.{bid}.self_attn.attn_sub_norm": "blk.{bid}.attn_sub_norm",
    "model.layers.{bid}.mlp.ffn_sub_norm": "blk.{bid}.ffn_sub_norm",
    "lm_head": "output",
}

BITNET = Family(
    "bitnet", "BitNet b1.58", "tiny",
    norms=("attention", "heads", "ffn", "final"), norms_neurons=True,
    folders=(Folder("bitnet", tensors=TENSORS, defaults=DEFAULTS),),
)  # fmt: skip

FAMILIES = (BITNET, replace(BITNET, architecture="bitnet-b1.58", activation="relu2", folders=()))
