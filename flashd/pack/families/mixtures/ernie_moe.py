"""ERNIE 4.5 as a mixture: a first layer without experts, experts that all tokens use, a bias that only chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder, Mixture

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 4, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "moe_intermediate_size": 1536, "moe_k": 6, "moe_num_experts": 64,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_layer_end_index": -1,
}  # fmt: skip


def adapt(config: Config, path: Path) -> Config:
    """The configuration, if all layers from one on have experts, with its normalising that GGUF takes for granted."""
    full: dict[str, Any] = dict(config)
    if full["moe_layer_interval"] != 1 or full["moe_layer_end_index"] not in (-1, full["num_hidden_layers"] - 1):
        raise DataError(f"{path}: layers without experts behind others (moe_layer_interval, moe_layer_end_index)")
    return full


FAMILIES = (
    Family(
        "ernie4_5-moe", "ERNIE 4.5, mixtures", "tiny",
        permuted=True, mixture=Mixture(leaned=True, leading=True, shared=True),
        folders=(
            Folder(
                "ernie4_5_moe", defaults=DEFAULTS, adapt=adapt,
                keys={
                    "expert_count": "moe_num_experts", "expert_used_count": "moe_k",
                    "expert_shared_count": "moe_num_shared_experts",
                    "leading_dense_block_count": "moe_layer_start_index",
                },
                tensors={
                    "model.layers.{bid}.mlp.moe_statics.e_score_correction_bias": "blk.{bid}.exp_probs_b.bias",
                },
            ),
        ),
    ),
)  # fmt: skip
