"""Granite 4: most layers have a Mamba-2 mixer in place of attention; dense, or a mixture with a shared expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.dense import granite
from flashd.pack.families.family import Config, Family, Folder, Mixture
from flashd.pack.families.recurrent.qwen35 import less_than_zero
from flashd.pack.families.tensors import TURNED

KINDS = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}
"""config.json's names of the kinds of layers, and whether they attend."""

KEYS = {
    "ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state", "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads", "ssm.inner_size": "mamba_inner_size", TURNED: "turned",
}  # fmt: skip
TENSORS = {
    f"model.layers.{{bid}}.mamba.{theirs}": f"blk.{{bid}}.{ours}"
    for theirs, ours in {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias"}.items()
}  # fmt: skip
DEFAULTS = {
    **granite.DEFAULTS, "mamba_d_conv": 4, "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_n_heads": 128,
    "mamba_expand": 2, "shared_intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
REFUSED = {"mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True}
"""Flags that no model of the family has so far."""


def adapt(config: Config, path: Path) -> Config:
    """The configuration with a number of heads of keys for each layer, as GGUF has it."""
    full: dict[str, Any] = dict(config)
    refuse(full, REFUSED, path)
    layers = full.get("num_hidden_layers", 0)
    kinds = full.pop("layer_types", None) or full.pop("layers_block_type", None) or ["mamba"] * layers
    if unknown := set(map(str, kinds)) - set(KINDS):
        raise DataError(f"{path}: a layer of kind {min(unknown)!r}; known are {', '.join(KINDS)}")
    keys = full.get("num_key_value_heads", full.get("num_attention_heads", 0))
    full["num_key_value_heads"] = [keys if KINDS[kind] else 0 for kind in kinds]
    full["mamba_inner_size"] = int(full["mamba_expand"] * full.get("hidden_size", 0))
    turned = full.pop("position_embedding_type", None)
    if turned not in (None, "rope", "nope"):
        raise DataError(f"{path}: positions of kind {turned!r} (position_embedding_type) are not supported")
    full["turned"] = turned == "rope"
    return full


def refuse(config: dict[str, Any], flags: Mapping[str, bool], path: Path) -> None:
    """Raises DataError for one of these values of flags, or for time steps that have bounds. Takes them out."""
    for name, value in flags.items():
        if config.pop(name, not value) is value:
            raise DataError(f"{path}: {name} {str(value).lower()} is not supported")
    limits = config.pop("time_step_limit", None)
    if limits and [_number(each) for each in limits] != [0.0, math.inf]:
        raise DataError(f"{path}: bounds of time steps (time_step_limit) are not supported")


def _number(value: Any) -> float:
    """JSON has no infinity: transformers writes it as an object."""
    return float(value.get("__float__", "nan") if isinstance(value, dict) else value)


def adapt_plain(config: Config, path: Path) -> Config:
    """Of a model without experts, whose FFN is what others have as their shared expert."""
    full = dict(adapt(config, path))
    full["intermediate_size"] = full["shared_intermediate_size"]
    return {key: value for key, value in full.items() if key not in ("num_local_experts", "num_experts_per_tok")}


PLAIN = Folder(
    "granitemoehybrid", permuted=True, rows=granite.rows, adapt=adapt_plain, defaults=DEFAULTS,
    keys=granite.SCALES | KEYS, changed={"ssm_a": less_than_zero},
    tensors=TENSORS | {granite.SHARED_OUT: "blk.{bid}.ffn_down"},
    split={granite.SHARED_IN: ("blk.{bid}.ffn_gate", "blk.{bid}.ffn_up")},
)  # fmt: skip
MIXTURE = replace(
    PLAIN, plain=PLAIN, adapt=adapt, keys={**granite.SHARING.keys, **KEYS}, joined=granite.JOINED,
    tensors={**TENSORS, **granite.SHARING.tensors}, split=granite.SHARING.split,
)  # fmt: skip
SSM = ("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size")
"""The keys of Mamba-2 mixers."""

FAMILIES = (
    Family(
        "granitehybrid", "Granite 4", "tiny",
        permuted=True, mamba="instead", may_turn=True, mixture=Mixture(shared=True),
        reads=(*granite.READS, *SSM), folders=(MIXTURE,),
    ),
)  # fmt: skip
