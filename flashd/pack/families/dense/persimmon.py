"""Persimmon."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

DEFAULTS = {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "max_position_embeddings": 16384}
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "model.layers.{bid}.input_layernorm": "blk.{bid}.attn_norm",
    "model.layers.{bid}.self_attn.query_key_value": "blk.{bid}.attn_qkv",
    "model.layers.{bid}.self_attn.q_layernorm": "blk.{bid}.attn_q_norm",
    "model.layers.{bid}.self_attn.k_layernorm": "blk.{bid}.attn_k_norm",
    "model.layers.{bid}.self_attn.dense": "blk.{bid}.attn_output",
    "model.layers.{bid}.post_attention_layernorm": "blk.{bid}.ffn_norm",
    "model.layers.{bid}.mlp.dense_h_to_4h": "blk.{bid}.ffn_up",
    "model.layers.{bid}.mlp.dense_4h_to_h": "blk.{bid}.ffn_down",
}

FAMILIES = (
    Family(
        "persimmon", "Persimmon", "tiny",
        norm="layer", norms=("attention", "query", "key", "ffn", "final"), gated=False, activation="relu2",
        biases=("qkv", "output", "inputs", "down"),
        folders=(Folder("persimmon", fused=True, tensors=TENSORS, defaults=DEFAULTS),),
    ),
)  # fmt: skip
