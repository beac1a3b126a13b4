"""Granite 3, dense and as a mixture: Llama with scales of embeddings, attention, branches and logits.

Mixtures may have a shared expert, and are then of another type in a folder.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder, Mixture

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

MOST_NEURONS = 1 << 24
SHARED_IN, SHARED_OUT = (f"model.layers.{{bid}}.shared_mlp.{part}_linear" for part in ("input", "output"))


def rows(config: Config, part: str) -> npt.NDArray[np.int64] | None:
    """The order of rows, see Folder: those of a shared expert's gate and up are in one tensor. Raises DataError."""
    neurons = int(config.get("shared_intermediate_size", 0))
    if not 0 <= neurons <= MOST_NEURONS:
        raise DataError(f"{neurons} neurons (shared_intermediate_size); {MOST_NEURONS} at the most")
    both = {"ffn_gate": 0, "ffn_gate_shexp": 0, "ffn_up": neurons, "ffn_up_shexp": neurons}
    return both[part] + np.arange(neurons) if neurons and part in both else None


MIXTURE = Folder("granitemoe", permuted=True, keys=SCALES, defaults=DEFAULTS, tensors=EXPERTS, joined=JOINED)
SHARING = replace(
    MIXTURE, model_type="granitemoeshared", rows=rows,
    keys=SCALES | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
    tensors=EXPERTS | {SHARED_OUT: "blk.{bid}.ffn_down_shexp"},
    split={SHARED_IN: ("blk.{bid}.ffn_gate_shexp", "blk.{bid}.ffn_up_shexp")},
)  # fmt: skip

FAMILIES = (
    Family(
        "granite", "Granite 3, dense", "tiny",
        permuted=True, may_have=("qkv", "output", "inputs", "down"), reads=READS,
        folders=(Folder("granite", permuted=True, keys=SCALES, defaults=DEFAULTS),),
    ),
    Family(
        "granitemoe", "Granite 3, mixtures", "tiny",
        permuted=True, may_have=("qkv", "output"), reads=READS, mixture=Mixture(shared=True),
        folders=(MIXTURE, SHARING),
    ),
)  # fmt: skip
