"""OPT."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

TENSORS = {
    "model.decoder.embed_tokens": "token_embd",
    "model.decoder.embed_positions": "position_embd",
    "model.decoder.project_in": "project_in",
    "model.decoder.project_out": "project_out",
    "model.decoder.final_layer_norm": "output_norm",
    "lm_head": "output",
    "model.decoder.layers.{bid}.self_attn_layer_norm": "blk.{bid}.attn_norm",
    "model.decoder.layers.{bid}.self_attn.q_proj": "blk.{bid}.attn_q",
    "model.decoder.layers.{bid}.self_attn.k_proj": "blk.{bid}.attn_k",
    "model.decoder.layers.{bid}.self_attn.v_proj": "blk.{bid}.attn_v",
    "model.decoder.layers.{bid}.self_attn.out_proj": "blk.{bid}.attn_output",
    "model.decoder.layers.{bid}.final_layer_norm": "blk.{bid}.ffn_norm",
    "model.decoder.layers.{bid}.fc1": "blk.{bid}.ffn_up",
    "model.decoder.layers.{bid}.fc2": "blk.{bid}.ffn_down",
}

FAMILIES = (
    Family(
        "opt", "OPT", "tiny",
        norm="layer", gated=False, activation="relu", rotary=False, position_offset=2,
        biases=("qkv", "output", "inputs", "down"),
        folders=(
            Folder(
                "opt", tensors=TENSORS,
                keys={"feed_forward_length": "ffn_dim", "norm_before": "do_layer_norm_before"},
                defaults={"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 2048},
            ),
        ),
    ),
)  # fmt: skip
