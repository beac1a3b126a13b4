"""Gemma 4: heads of two sizes, layers that share keys and values, and what each token says to each layer.

The mixture (26B-A4B) has experts beside the FFN of each layer. Both branches have norms of their own, and so has the
router. Their sum is normed as the FFN's output is in the others.

Sources: transformers' modeling_gemma4.py, and llama.cpp's src/models/gemma4.cpp for the layout of a GGUF file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder, Mixture

OF_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
"""What config.json says of experts. It means nothing in a model that has none."""

SLIDING, FULL = "sliding_attention", "full_attention"


def adapt(config: Config, path: Path) -> Config:
    """The configuration with the sizes of heads of both kinds of layers, as GGUF has them."""
    full: dict[str, Any] = dict(config)
    if full.pop("attention_bias", None):
        raise DataError(f"{path}: biases in the attention (attention_bias) are not supported in Gemma 4 yet")
    if not full.pop("enable_moe_block", None):
        full = {key: value for key, value in full.items() if key not in OF_EXPERTS}
    if full.pop("use_bidirectional_attention", None) == "all":
        raise DataError(f"{path}: tokens that look ahead (use_bidirectional_attention) are not supported")
    layers, kinds = int(full.get("num_hidden_layers", 30)), full.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
    full["layer_types"] = kinds = [*kinds[:-1], FULL]
    own = full.pop("per_layer_config", None) or {}  # transformers 5.24 and later
    wide = {key: value for i, kind in enumerate(kinds) if kind == FULL for key, value in own.get(str(i), {}).items()}
    if any(own[i] != wide or kinds[int(i)] != FULL for i in own):
        raise DataError(
            f"{path}: layers of one kind with heads of several sizes (per_layer_config) are not supported"
        )
    narrow, keys = full.get("head_dim", 256), full.get("num_key_value_heads", 4)
    shares = bool(full.pop("attention_k_eq_v", False))
    of_full = full.pop("num_global_key_value_heads", None) if shares else None
    of_full = wide.get("num_key_value_heads", of_full or keys)
    if full.pop("use_double_wide_mlp", None):
        width, borrowing = full.get("intermediate_size", 9216), int(full.get("num_kv_shared_layers", 0))
        full["intermediate_size"] = [width * (1 + (i >= layers - borrowing)) for i in range(layers)]
    full["head_dim_swa"] = narrow
    full["head_dim"] = wide.get("head_dim", full.pop("global_head_dim", None) or (narrow if own else 512))
    full["num_key_value_heads"] = [of_full if kind == FULL else keys for kind in kinds]
    return full


DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072, "sliding_window": 512, "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}  # fmt: skip
KEYS = {
    "attention.key_length_swa": "head_dim_swa", "attention.value_length_swa": "head_dim_swa",
    "rope.dimension_count_swa": "head_dim_swa", "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input", "expert_used_count": "top_k_experts",
}  # fmt: skip
TENSORS = {
    f"model.layers.{{bid}}.{theirs}": f"blk.{{bid}}.{ours}"
    for theirs, ours in {
        "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.down_proj": "ffn_down_exps.weight",
    }.items()
}  # fmt: skip
JOINED = {"model.layers.{bid}.experts.gate_up_proj": ("blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps")}

SEPARATE = Family(
    "gemma4", "Gemma 4, its text part: E2B, E4B, the mixture 26B-A4B and the dense 31B", "tiny",
    activation="gelu_tanh", scaled_embeddings=True, global_every=6, local_base=10000.0, attention_scale=1.0,
    norms=("attention", "query", "key", "attention_branch", "ffn", "ffn_branch", "final"),
    may_have=("token_branch",), norm_values=True, sized_heads=True, borrows=True, sized_ffns=True,
    token_inputs=True, layer_scales=True, reads=tuple(KEYS),
    names={"shared_gate": "ffn_gate", "shared_up": "ffn_up", "shared_down": "ffn_down"},
    mixture=Mixture(
        shared=True, dense=True, norms=("shared_branch", "experts", "experts_branch"), scaled=True,
    ),
    folders=(
        Folder(
            "gemma4_text", seeing=("gemma4",), adapt=adapt, keys=KEYS, tensors=TENSORS, joined=JOINED,
            defaults=DEFAULTS,
        ),
    ),
)  # fmt: skip
"""With the gate and up rows of experts in stacks of their own."""

JOINED_STACK = "ffn_gate_up_exps"
"""What llama.cpp's own files have in place of these: of each expert the gate's rows, and behind them the up rows."""

FAMILIES = (
    replace(
        SEPARATE,
        variant=(
            f"blk.0.{JOINED_STACK}.weight",
            replace(SEPARATE, joined_inputs=True, names={**SEPARATE.names, "inputs": JOINED_STACK}),
        ),
    ),
)
