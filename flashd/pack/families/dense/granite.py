"""Granite 3, dense and as a mixture: Llama with scales of embeddings, attention, branches and logits."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder, Mixture

SCALES = {
    "embedding_scale": "embedding_multiplier", "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
"""GGUF's keys and the folder's. Logits are divided by theirs."""

READS = ("embedding_scale", "residual_scale", "logit_scale")
DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
EXPERTS = {
    "model.layers.{bid}.block_sparse_moe.router.layer": "blk.{bid}.ffn_gate_inp",
    "model.layers.{bid}.block_sparse_moe.output_linear": "blk.{bid}.ffn_down_exps",
}  # fmt: skip
JOINED = {
    "model.layers.{bid}.block_sparse_moe.input_linear": ("blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps"),
}  # fmt: skip

FAMILIES = (
    Family(
        "granite", "Granite 3, dense", "tiny",
        permuted=True, may_have=("qkv", "output", "inputs", "down"), reads=READS,
        folders=(Folder("granite", permuted=True, keys=SCALES, defaults=DEFAULTS),),
    ),
    Family(
        "granitemoe", "Granite 3, mixtures", "tiny",
        permuted=True, may_have=("qkv", "output"), reads=READS, mixture=Mixture(),
        folders=(
            Folder(
                "granitemoe", permuted=True, keys=SCALES, defaults=DEFAULTS, tensors=EXPERTS, joined=JOINED,
            ),
        ),
    ),
)  # fmt: skip
