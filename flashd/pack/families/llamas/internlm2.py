"""InternLM 2 and 2.5: a Llama whose folder has queries, keys and values in one matrix."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

TENSORS = {
    "model.tok_embeddings": "token_embd",
    "model.norm": "output_norm",
    "output": "output",
    "model.layers.{bid}.attention_norm": "blk.{bid}.attn_norm",
    "model.layers.{bid}.attention.wqkv": "blk.{bid}.attn_qkv",
    "model.layers.{bid}.attention.wo": "blk.{bid}.attn_output",
    "model.layers.{bid}.ffn_norm": "blk.{bid}.ffn_norm",
    "model.layers.{bid}.feed_forward.w1": "blk.{bid}.ffn_gate",
    "model.layers.{bid}.feed_forward.w3": "blk.{bid}.ffn_up",
    "model.layers.{bid}.feed_forward.w2": "blk.{bid}.ffn_down",
}

FAMILIES = (
    Family(
        "internlm2", "InternLM 2, InternLM 2.5", "tiny",
        permuted=True, may_have=("qkv", "output"),
        folders=(
            Folder(
                "internlm2", permuted=True, fused=True, tensors=TENSORS,
                defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
            ),
        ),
    ),
)  # fmt: skip
