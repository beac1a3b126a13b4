"""gpt-oss: attention sinks, a window in every other layer, biases everywhere, a SwiGLU whose inputs are bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.graphs.products import CLAMPED_AT, CLAMPED_SLOPE
from flashd.pack.families.family import Config, Family, Folder, Mixture

ROPE = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip
DEFAULTS = {
    "num_hidden_layers": 36, "num_local_experts": 128, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "num_experts_per_tok": 4, "rope_theta": 150000.0, "hidden_act": "silu",
}  # fmt: skip
BOUNDS = {"swiglu_limit": CLAMPED_AT, "swiglu_alpha": CLAMPED_SLOPE}


def adapt(config: Config, path: Path) -> Config:
    """The configuration with its rotary scaling and the layers' kinds, which it may leave out."""
    for key, known in BOUNDS.items():
        if config.get(key, known) != known:
            raise DataError(f"{path}: {key} is {config[key]}; flashd supports only {known}")
    full: dict[str, Any] = dict(config)
    full.setdefault("layer_types", ["sliding_attention", "full_attention"] * (full["num_hidden_layers"] // 2 + 1))
    full["layer_types"] = full["layer_types"][: full["num_hidden_layers"]]
    if not (full.get("rope_parameters") or full.get("rope_scaling")):
        full["rope_parameters"] = ROPE
    return full


FAMILIES = (
    Family(
        "gpt-oss", "gpt-oss", "tiny",
        biases=("qkv", "output", "router", "inputs", "down"), activation="clamped_silu", sinks=True, global_every=2,
        yarn_truncated=False, mixture=Mixture(), names={"ffn_norm": "post_attention_norm"},
        folders=(
            Folder(
                "gpt_oss", defaults=DEFAULTS, adapt=adapt, activations={"silu": "clamped_silu"},
                tensors={"model.layers.{bid}.self_attn.sinks": "blk.{bid}.attn_sinks.weight"},
                joined={
                    "model.layers.{bid}.mlp.experts.gate_up_proj": (
                        "blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps",
                    ),
                    "model.layers.{bid}.mlp.experts.down_proj": ("blk.{bid}.ffn_down_exps",),
                },
                alternating=True, across=True,
            ),
        ),
    ),
)  # fmt: skip
