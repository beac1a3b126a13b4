"""SmallThinker: the router reads what comes into a layer, and of four layers the first sees all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder, Mixture

SOFTMAX, SIGMOID = 1, 2
"""Of the gguf package's ExpertGatingFuncType."""


def adapt(config: Config, path: Path) -> Config:
    """The layers' kinds as other families name them."""
    full: dict[str, Any] = dict(config)
    layers = full.get("num_hidden_layers", 0)
    local = full.pop("sliding_window_layout", None)
    window = full.pop("sliding_window_size", None)
    full.pop("sliding_window", None)
    if local and any(local):
        full["sliding_window"] = window
        full["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in local]
    turned = local if local and any(local) else [1] * layers
    if full.pop("rope_layout", turned) != turned:
        raise DataError(f"{path}: layers without rotary embedding (rope_layout) beside those without a window")
    if full.pop("moe_enable_early_router", True) is False:
        raise DataError(f"{path}: a router behind the attention (moe_enable_early_router) is not supported here")
    if "moe_primary_router_apply_softmax" in full:
        full["expert_gating_func"] = SOFTMAX if full.pop("moe_primary_router_apply_softmax") else SIGMOID
    return full


FAMILIES = (
    Family(
        "smallthinker", "SmallThinker", "tiny",
        activation="relu", mixture=Mixture(early=True), global_every=4, global_first=True, global_unturned=True,
        folders=(
            Folder(
                "smallthinker", adapt=adapt,
                keys={
                    "feed_forward_length": "moe_ffn_hidden_size",
                    "expert_feed_forward_length": "moe_ffn_hidden_size",
                    "expert_count": "moe_num_primary_experts",
                    "expert_used_count": "moe_num_active_primary_experts",
                    "expert_gating_func": "expert_gating_func",
                },
            ),
        ),
    ),
)  # fmt: skip
