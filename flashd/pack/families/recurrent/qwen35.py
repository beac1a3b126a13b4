"""Qwen3.5 and Qwen3.6: of four layers three have a gated delta net, and the fourth has attention with a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.errors import DataError
from flashd.pack.families.family import Config, DeltaNets, Family, Folder, Mixture
from flashd.pack.open_model import GUESSING

KINDS = {"full_attention": False, "linear_attention": True}
"""config.json's names of the kinds of layers, and whether they are delta nets."""

KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": "linear_inner_size", "attention.recurrent_layers": "recurrent_layers",
}  # fmt: skip
DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 256, "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
TENSORS = {
    f"model.layers.{{bid}}.linear_attn.{theirs}": f"blk.{{bid}}.{ours}"
    for theirs, ours in {
        "in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_b": "ssm_beta", "in_proj_a": "ssm_alpha",
        "out_proj": "ssm_out", "norm": "ssm_norm", "conv1d": "ssm_conv1d", "A_log": "ssm_a", "dt_bias": "ssm_dt.bias",
    }.items()
}  # fmt: skip
STACKS = {"model.layers.{bid}.mlp.experts.down_proj": "blk.{bid}.ffn_down_exps.weight"}
JOINED = {
    "model.layers.{bid}.mlp.experts.gate_up_proj": ("blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps"),
}
MIXTURE = {
    "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
READS = (
    "ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size",
    "full_attention_interval", "attention.recurrent_layers", "nextn_predict_layers",
    "rope.dimension_sections",  # the three places of a picture's token, which are one for text
)  # fmt: skip


def adapt(config: Config, path: Path) -> Config:
    """The configuration with a list of which layers are delta nets, and with rotary parameters of text alone."""
    full: dict[str, Any] = dict(config)
    for name in ("attention_bias", "mlp_bias"):
        if full.pop(name, False):
            raise DataError(f"{path}: attention with biases ({name}) is not supported here")
    if full.pop("attn_output_gate", True) is False:
        raise DataError(f"{path}: attention without a gate (attn_output_gate) is not supported here")
    layers, every = full.get("num_hidden_layers", 0), full.pop("full_attention_interval", 4)
    kinds = full.pop("layer_types", None)
    if kinds is None:
        full["recurrent_layers"] = [(i + 1) % every != 0 for i in range(layers)]
    elif unknown := set(map(str, kinds)) - set(KINDS):
        raise DataError(f"{path}: a layer of kind {min(unknown)!r}; known are {', '.join(KINDS)}")
    else:
        full["recurrent_layers"] = [KINDS[kind] for kind in kinds]
    _, values, _, width = heads(full)
    full["linear_inner_size"] = values * width
    for name in ("rope_parameters", "rope_scaling"):
        rope = full.get(name) or {}
        if isinstance(rope, dict):  # in what three parts a picture's places turn; those of text are alike
            full[name] = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return full


def less_than_zero(logarithms: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How fast states fade, as GGUF has it, from its logarithm."""
    return np.asarray(-np.exp(logarithms), np.float32)


def heads(config: Config) -> tuple[int, int, int, int]:
    """(heads of keys, of values, the width of one of each). Raises ValueError if they make no model."""
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    keys, values, *widths = (int(config[f"linear_{name}"]) for name in names)
    if not 1 <= keys <= values <= 4096 or values % keys or not all(1 <= width <= 4096 for width in widths):
        raise ValueError(f"delta nets of {keys} heads of keys and {values} of values, {widths} wide")
    return keys, values, widths[0], widths[1]


def _tiled(config: Config, width: int) -> npt.NDArray[np.int64]:
    """Heads of values, each `width` wide, in GGUF's order: first the first of each key, then the second of each."""
    keys, values, _, _ = heads(config)
    return np.arange(values * width).reshape(keys, -1, width).swapaxes(0, 1).reshape(-1)


def rows(config: Config, part: str) -> npt.NDArray[np.int64] | None:
    """The order of rows, see Folder."""
    keys, _, key_width, value_width = heads(config)
    match part:
        case "attn_gate":
            return _tiled(config, value_width)
        case "ssm_beta" | "ssm_alpha" | "ssm_a" | "ssm_dt":
            return _tiled(config, 1)
        case "attn_qkv" | "ssm_conv1d":
            before = 2 * keys * key_width
            return np.concatenate([np.arange(before), before + _tiled(config, value_width)])
    return None


def columns(config: Config, part: str) -> npt.NDArray[np.int64] | None:
    """The order of columns, see Folder."""
    return _tiled(config, heads(config)[3]) if part == "ssm_out" else None


FAMILIES = (
    Family(
        "qwen35", "Qwen3.5, Qwen3.6", "tiny",
        norms=("attention", "query", "key", "ffn", "final"), names={"ffn_norm": "post_attention_norm"},
        delta_nets=DeltaNets(tiled=True), attention_gated=True, reads=READS,
        folders=(
            Folder(
                "qwen3_5_text", seeing=("qwen3_5",), shift=1.0, unshifted=("ssm_norm",),
                changed={"ssm_a": less_than_zero}, rows=rows, columns=columns, adapt=adapt, keys=KEYS,
                tensors=TENSORS, defaults={**DEFAULTS, "num_key_value_heads": 4}, left_out={"mtp.": GUESSING},
            ),
        ),
    ),
    Family(
        "qwen35moe", "Qwen3.5 and Qwen3.6 as mixtures", "tiny",
        norms=("attention", "query", "key", "ffn", "final"), names={"ffn_norm": "post_attention_norm"},
        delta_nets=DeltaNets(tiled=True), attention_gated=True, reads=READS,
        mixture=Mixture(shared=True, weighed=True),
        folders=(
            Folder(
                "qwen3_5_moe_text", seeing=("qwen3_5_moe",), shift=1.0, unshifted=("ssm_norm",),
                changed={"ssm_a": less_than_zero}, rows=rows, columns=columns, adapt=adapt, keys=KEYS,
                tensors=TENSORS | STACKS, joined=JOINED,
                defaults={**DEFAULTS, **MIXTURE}, left_out={"mtp.": GUESSING},
            ),
        ),
    ),
)  # fmt: skip
