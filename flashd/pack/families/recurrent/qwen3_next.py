"""Qwen3-Next: the delta nets of Qwen3.5, their rows in another order, beside a mixture with a shared expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.errors import DataError
from flashd.pack.families.family import Config, DeltaNets, Family, Folder, Mixture
from flashd.pack.families.recurrent import qwen35
from flashd.pack.open_model import GUESSING

TENSORS = {
    f"model.layers.{{bid}}.linear_attn.{theirs}": f"blk.{{bid}}.{ours}"
    for theirs, ours in {
        "in_proj_ba": "ssm_ba", "out_proj": "ssm_out", "norm": "ssm_norm", "conv1d": "ssm_conv1d", "A_log": "ssm_a",
        "dt_bias": "ssm_dt.bias",
    }.items()
}  # fmt: skip
SPLIT = {"model.layers.{bid}.linear_attn.in_proj_qkvz": ("blk.{bid}.attn_qkv", "blk.{bid}.attn_gate")}
MIXTURE = {
    "num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
}  # fmt: skip


def adapt(config: Config, path: Path) -> Config:
    """As Qwen3.5's. Every layer has to be a mixture."""
    full: dict[str, Any] = dict(config)
    if full.pop("mlp_only_layers", None) or full.pop("decoder_sparse_step", 1) != 1:
        raise DataError(
            f"{path}: layers without a mixture (mlp_only_layers, decoder_sparse_step) beside others are not supported"
        )
    return qwen35.adapt(full, path)


def rows(config: Config, part: str) -> npt.NDArray[np.int64] | None:
    """GGUF has queries, keys, values and z each by itself, the folder those of the heads that share a key."""
    if part not in ("attn_qkv", "attn_gate"):
        return None
    keys, values, width, value_width = qwen35.heads(config)
    shared = values // keys * value_width
    groups = np.arange(keys * (2 * width + 2 * shared)).reshape(keys, -1)
    *mixed, z = np.split(groups, [width, 2 * width, 2 * width + shared], axis=1)
    return z.reshape(-1) if part == "attn_gate" else np.concatenate([each.reshape(-1) for each in mixed])


FAMILIES = (
    Family(
        "qwen3next", "Qwen3-Next", "tiny",
        norms=("attention", "query", "key", "ffn", "final"), names={"ffn_norm": "post_attention_norm"},
        delta_nets=DeltaNets(joined_rates=True), attention_gated=True, reads=qwen35.READS,
        mixture=Mixture(shared=True, weighed=True),
        folders=(
            Folder(
                "qwen3_next", shift=1.0, unshifted=("ssm_norm",), changed={"ssm_a": qwen35.less_than_zero}, rows=rows,
                split=SPLIT, adapt=adapt, keys=qwen35.KEYS, tensors=TENSORS | qwen35.STACKS, joined=qwen35.JOINED,
                defaults={**qwen35.DEFAULTS, **MIXTURE}, left_out={"mtp.": GUESSING},
            ),
        ),
    ),
)  # fmt: skip
