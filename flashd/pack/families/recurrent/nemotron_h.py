"""Nemotron-H and Nemotron Nano 2: each layer has a Mamba-2 mixer, attention without rotary embedding, or an FFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder
from flashd.pack.families.recurrent import granite_hybrid
from flashd.pack.families.recurrent.qwen35 import less_than_zero

KINDS = {
    "M": "mamba", "linear_attention": "mamba", "mamba": "mamba", "*": "attention", "full_attention": "attention",
    "attention": "attention", "-": "mlp", "mlp": "mlp",
}  # fmt: skip
"""config.json's names of the kinds of layers, in a text or in a list."""

KEYS = {
    "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "ssm_state_size", "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads", "ssm.inner_size": "inner_size",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon", "hidden_activation": "mlp_hidden_act",
}  # fmt: skip
DEFAULTS = {
    "layer_norm_epsilon": 1e-5, "max_position_embeddings": 4096, "num_key_value_heads": 8, "head_dim": 128,
    "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4,
    "mlp_hidden_act": "relu2", "intermediate_size": 21504, "tie_word_embeddings": False,
}  # fmt: skip
REFUSED = {
    "use_bias": True, "mlp_bias": True, "attention_bias": True, "mamba_proj_bias": True, "use_conv_bias": False,
}  # fmt: skip
OF_MIXTURES = ("routed_scaling_factor", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size")
TENSORS = {
    f"{before}.layers.{{bid}}.{theirs}": f"blk.{{bid}}.{ours}"
    for before in ("backbone", "model")
    for theirs, ours in {
        "norm": "attn_norm", "mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.dt_bias": "ssm_dt.bias",
        "mixer.in_proj": "ssm_in", "mixer.conv1d": "ssm_conv1d", "mixer.norm": "ssm_norm",
        "mixer.out_proj": "ssm_out",
        "mixer.q_proj": "attn_q", "mixer.k_proj": "attn_k", "mixer.v_proj": "attn_v", "mixer.o_proj": "attn_output",
        "mixer.up_proj": "ffn_up", "mixer.down_proj": "ffn_down",
    }.items()
}  # fmt: skip


def adapt(config: Config, path: Path) -> Config:
    """The configuration with numbers of heads of keys and of neurons for each layer, as GGUF has them."""
    full: dict[str, Any] = dict(config)
    granite_hybrid.refuse(full, REFUSED, path)
    kinds = full.pop("layers_block_type", None) or full.pop("layer_types", None)
    kinds = kinds or full.pop("hybrid_override_pattern", "")
    if unknown := set(map(str, kinds)) - set(KINDS):
        raise DataError(f"{path}: a layer of kind {min(unknown)!r}; known are {', '.join(KINDS)}")
    known, keys, neurons = [KINDS[kind] for kind in kinds], full["num_key_value_heads"], full["intermediate_size"]
    full |= {
        "num_hidden_layers": len(known),
        "num_key_value_heads": [keys if kind == "attention" else 0 for kind in known],
        "intermediate_size": [neurons if kind == "mlp" else 0 for kind in known],
        "head_dim": full.pop("attention_head_dim", None) or full["head_dim"],
        "inner_size": full["mamba_num_heads"] * full["mamba_head_dim"],
    }
    return {name: value for name, value in full.items() if name not in OF_MIXTURES}


FAMILIES = (
    Family(
        "nemotron_h", "Nemotron-H, Nemotron Nano 2", "tiny",
        norms=("attention", "ffn", "final"), gated=False, activation="relu2", rotary=False, mamba="instead",
        halves=True, sized_ffns=True, reads=granite_hybrid.SSM,
        folders=(
            Folder(
                "nemotron_h", adapt=adapt, keys=KEYS, changed={"ssm_a": less_than_zero}, tensors=TENSORS,
                defaults=DEFAULTS,
            ),
        ),
    ),
)  # fmt: skip
