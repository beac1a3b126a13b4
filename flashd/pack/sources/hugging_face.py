"""What a Hugging Face folder's config.json and tensors are called in a GGUF file of the same model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from flashd.bundle.row_kinds import Floats
from flashd.errors import DataError

Config = Mapping[str, Any]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Conversion:
    """How the folders of one `model_type` become what a GGUF file holds; the defaults change nothing."""

    architecture: str  # in GGUF
    permuted: bool = False  # GGUF has the rows of q and k in rotary pairs (2i, 2i + 1), the folder in halves
    fused: bool = False  # the folder has q, k and v by group of heads in one matrix, GGUF one after the other
    shift: float = 0.0  # GGUF has the weights of norms with this added
    names: Mapping[str, str] = field(default_factory=dict)  # of tensors that the gguf package does not know
    defaults: Config = field(default_factory=dict)  # what config.json may leave out
    activations: Mapping[str, str] = field(default_factory=dict)  # that config.json calls by another's name


LLAMA = Conversion("llama", permuted=True)
QWEN = {"use_sliding_window": False}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}

CONVERSIONS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "sparsellama": LLAMA,  # ProSparse
    "bamboo": Conversion("llama", permuted=True, activations={"relu": "drelu"}),  # Bamboo, TurboSparse-Mistral
    "smollm3": Conversion("smollm3", permuted=True, defaults={**QWEN, "tie_word_embeddings": True}),
    "qwen2": Conversion("qwen2", defaults=QWEN),
    "qwen3": Conversion("qwen3", defaults=QWEN),
    "qwen3_moe": Conversion("qwen3moe", defaults={**QWEN, "norm_topk_prob": False}),
    "olmoe": Conversion("olmoe", defaults={"norm_topk_prob": False}),
    "smallthinker": Conversion("smallthinker"),
    "gemma": Conversion("gemma", shift=1.0, defaults=GEMMA),
    "gemma2": Conversion("gemma2", shift=1.0, defaults=GEMMA),
    "gemma3_text": Conversion(
        "gemma3", shift=1.0,
        defaults={
            **GEMMA, "max_position_embeddings": 131072, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "query_pre_attn_scalar": 256,
        },
    ),
    "phi": Conversion("phi2", defaults={"partial_rotary_factor": 0.5}),
    "nemotron": Conversion("nemotron", shift=1.0, defaults={"partial_rotary_factor": 0.5}),
    "bitnet": Conversion(
        "bitnet", defaults={"hidden_act": "relu2", "rope_theta": 500000.0},
        names={
            "model.layers.{bid}.self_attn.attn_sub_norm": "blk.{bid}.attn_sub_norm",
            "model.layers.{bid}.mlp.ffn_sub_norm": "blk.{bid}.ffn_sub_norm",
            "lm_head": "output",
        },
    ),
    "falcon": Conversion(
        "falcon", fused=True,
        defaults={"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "activation": "gelu"},
    ),
    "persimmon": Conversion(
        "persimmon", fused=True, defaults={"partial_rotary_factor": 0.5},
        names={
            "model.embed_tokens": "token_embd",
            "model.final_layernorm": "output_norm",
            "lm_head": "output",
            "model.layers.{bid}.input_layernorm": "blk.{bid}.attn_norm",
            "model.layers.{bid}.self_attn.query_key_value": "blk.{bid}.attn_qkv",
            "model.layers.{bid}.self_attn.q_layernorm": "blk.{bid}.attn_q_norm",
            "model.layers.{bid}.self_attn.k_layernorm": "blk.{bid}.attn_k_norm",
            "model.layers.{bid}.self_attn.dense": "blk.{bid}.attn_output",
            "model.layers.{bid}.post_attention_layernorm": "blk.{bid}.ffn_norm",
            "model.layers.{bid}.mlp.dense_h_to_4h": "blk.{bid}.ffn_up",
            "model.layers.{bid}.mlp.dense_4h_to_h": "blk.{bid}.ffn_down",
        },
    ),
    "opt": Conversion(
        "opt", defaults={"layer_norm_eps": 1e-5, "tie_word_embeddings": True},
        names={
            "model.decoder.embed_tokens": "token_embd",
            "model.decoder.embed_positions": "position_embd",
            "model.decoder.project_in": "project_in",
            "model.decoder.project_out": "project_out",
            "model.decoder.final_layer_norm": "output_norm",
            "lm_head": "output",
            "model.decoder.layers.{bid}.self_attn_layer_norm": "blk.{bid}.attn_norm",
            "model.decoder.layers.{bid}.self_attn.q_proj": "blk.{bid}.attn_q",
            "model.decoder.layers.{bid}.self_attn.k_proj": "blk.{bid}.attn_k",
            "model.decoder.layers.{bid}.self_attn.v_proj": "blk.{bid}.attn_v",
            "model.decoder.layers.{bid}.self_attn.out_proj": "blk.{bid}.attn_output",
            "model.decoder.layers.{bid}.final_layer_norm": "blk.{bid}.ffn_norm",
            "model.decoder.layers.{bid}.fc1": "blk.{bid}.ffn_up",
            "model.decoder.layers.{bid}.fc2": "blk.{bid}.ffn_down",
        },
    ),
}  # fmt: skip

KEYS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_local_experts", "num_experts", "moe_num_primary_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_num_active_primary_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "moe_ffn_hidden_size"),
    "expert_weights_norm": ("norm_topk_prob",),
    # GGUF has no key for these: the architecture says it all there
    "hidden_activation": ("hidden_activation", "hidden_act", "activation_function", "activation"),
    "hidden_activation_threshold": ("hidden_act_param",),
    "norm_before": ("do_layer_norm_before",),
}
"""Of each key, below the architecture's name, what the families call it in config.json."""

MOST_WIDTH = 1 << 16
"""Numbers of a head."""

ENDS = (".weight", ".bias")

NOT_READ = (
    ".rotary_emb.inv_freq", ".attention.bias", ".attn.bias", ".masked_bias", ".weight_scale",
    ".mlp.predictor.fc1.weight", ".mlp.predictor.fc2.weight",
)  # fmt: skip
"""Ends of names that are no weights of their own, or a predictor's of which neurons fire: flashd fits its own."""

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SEEING = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_SPEAKING = re.compile(r"^(model\.)?language_model\.(model\.)?")


def conversion_of(config: Config) -> Conversion:
    """How folders with this config.json are read; one of an unknown type is left for the families to refuse."""
    kind = str(config.get("model_type"))
    return CONVERSIONS.get(kind, Conversion(kind))


def flattened(config: Config) -> Config:
    """The configuration of a text model, out of that of one that also sees."""
    inner = config.get("text_config")
    if config.get("model_type") == "gemma3" and isinstance(inner, dict):
        outer = {k: v for k, v in config.items() if k != "text_config"}
        return {**outer, **inner, "model_type": "gemma3_text"}
    return config


def completed(config: Config, conversion: Conversion) -> Config:
    """The configuration with what it leaves out."""
    full = {**conversion.defaults, **{k: v for k, v in config.items() if v is not None}}
    if "hidden_act" in full:
        full["hidden_act"] = conversion.activations.get(full["hidden_act"], full["hidden_act"])
    if conversion.architecture == "falcon":
        full.setdefault("ffn_hidden_size", 4 * int(full.get("hidden_size", 0)))
        if not full.get("new_decoder_architecture"):
            full["num_key_value_heads"] = 1 if full.get("multi_query", True) else full.get("num_attention_heads")
        else:
            full.setdefault("num_key_value_heads", full.get("num_kv_heads"))
    return full


def hyper_parameters(config: Config, path: Path) -> dict[str, Any]:
    """The GGUF keys, below the architecture's name, of a completed config.json. Raises DataError."""
    if config.get("alibi"):
        raise DataError(f"{path}: attention biased by distance (alibi) is not supported")
    turned = [int((i + 1) % 4 != 0) for i in range(config.get("num_hidden_layers", 0))]
    if config.get("no_rope_layers", turned) != turned:
        raise DataError(f"{path}: layers without rotary embedding (no_rope_layers) other than each fourth")
    if local := config.get("sliding_window_layout"):  # SmallThinker's
        turned = local if any(local) else [1] * len(local)
        if config.get("rope_layout", [1] * len(local)) != turned:
            raise DataError(f"{path}: layers without rotary embedding (rope_layout) beside those without a window")
    if config.get("moe_enable_early_router") is False:
        raise DataError(f"{path}: a router behind the attention (moe_enable_early_router) is not supported here")
    out = {key: next((config[n] for n in names if n in config), None) for key, names in KEYS.items()}
    out |= _window(config) | _rotary(config)
    if "moe_primary_router_apply_softmax" in config:  # 1 and 2: the gguf package's ExpertGatingFuncType
        out["expert_gating_func"] = 1 if config["moe_primary_router_apply_softmax"] else 2
    if scalar := config.get("query_pre_attn_scalar"):
        out["attention.scale"] = float(scalar) ** -0.5
    return {key: value for key, value in out.items() if value is not None}


def head_dim(config: Config) -> int:
    """Raises ValueError for what would be no head but a bomb."""
    width = int(
        config.get("head_dim") or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    )
    if not 0 <= width <= MOST_WIDTH:
        raise ValueError(f"heads of {width} numbers; {MOST_WIDTH} at the most")
    return width


def _window(config: Config) -> dict[str, Any]:
    """Which layers see only so many tokens: True in the pattern for those that do."""
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers", 0)
    if local := config.get("sliding_window_layout"):  # SmallThinker's
        return {} if not any(local) else {
            "attention.sliding_window": config["sliding_window_size"],
            "attention.sliding_window_pattern": [bool(slides) for slides in local],
        }  # fmt: skip
    if not window or config.get("use_sliding_window") is False:
        return {}
    out: dict[str, Any] = {"attention.sliding_window": window}
    if kinds := config.get("layer_types"):
        out["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in kinds]
    elif "max_window_layers" in config:
        out["attention.sliding_window_pattern"] = [i >= config["max_window_layers"] for i in range(layers)]
    elif every := config.get("sliding_window_pattern"):
        out["attention.sliding_window_pattern"] = every
    if not any(np.atleast_1d(out.get("attention.sliding_window_pattern", True))):
        return {}
    return out


def _rope(config: Config, layers: str = "full_attention") -> Config:
    """Rotary parameters, where they may differ between layers that see all tokens and those that see a window."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(stated.get(layers) or {}) if {"full_attention", "sliding_attention"} & set(stated) else dict(stated)


def _rotary(config: Config) -> dict[str, Any]:
    rope, local = _rope(config), _rope(config, "sliding_attention")
    out: dict[str, Any] = {"rope.freq_base": rope.get("rope_theta", config.get("rope_theta"))}
    out["rope.freq_base_swa"] = config.get("rope_local_base_freq") or (
        local.get("rope_theta") if local != rope else None
    )
    if part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor")):
        out["rope.dimension_count"] = int(part * head_dim(config))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "llama3"):  # the second is in a tensor
        return out
    out |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.get("factor")}
    if kind == "yarn":
        out |= {
            "rope.scaling.original_context_length": rope.get(
                "original_max_position_embeddings", config.get("max_position_embeddings")
            ),
            "rope.scaling.attn_factor": rope.get("attention_factor"),
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    return out


def rope_divisors(config: Config) -> Floats | None:
    """[D / 2] what Llama 3 divides the angle of each pair by, which GGUF keeps as `rope_freqs.weight`.

    Slow pairs by `factor`, fast ones not at all, by a smooth step between (transformers, modeling_rope_utils).
    Raises KeyError where a parameter is missing.
    """
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    half = head_dim(config) // 2
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    turns = rope["original_max_position_embeddings"] * base ** (-np.arange(half) / half) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / (fast + (1 - fast) / rope["factor"]), np.float32)


class Names:
    """GGUF's names of a folder's tensors."""

    def __init__(self, conversion: Conversion, config: Config) -> None:
        self._tied = config.get("tie_word_embeddings") is True
        self._sees = "vision_config" in config
        layers = int(config.get("num_hidden_layers", 0))
        self._known = {
            theirs.format(bid=i) + end: ours.format(bid=i) + end
            for theirs, ours in conversion.names.items()
            for i in range(layers)
            for end in ENDS
        }
        known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}.get(
            conversion.architecture
        )
        self._table = None if known is None else gguf.get_tensor_name_map(known, layers)

    def find(self, name: str) -> tuple[str, int | None] | None:
        """(GGUF's name, number of the expert in its stack) of a tensor, its own where GGUF has none for it.

        None for what is no weight, or a part of a model that also sees.
        """
        if self._sees:
            name = _SPEAKING.sub("model.", name).replace("model.lm_head", "lm_head")
            if _SEEING.match(name):
                return None
        if name.endswith(NOT_READ) or (self._tied and name == "lm_head.weight"):
            return None
        expert = _EXPERT.search(name)
        merged = _EXPERT.sub(".experts.", name)
        found = self._known.get(merged) or (self._table and self._table.get_name(merged, ENDS))
        return found or name, int(expert[1]) if expert else None


def row_order(conversion: Conversion, config: Config, name: str, rows: int) -> Numbers | None:
    """For each of so many rows of the GGUF tensor `name`, the row of the folder's; None where they agree.

    Raises DataError if the heads make another number of rows.
    """
    part, width, heads = f".{name}".split(".")[-2], head_dim(config), config.get("num_attention_heads", 0)
    shared = config.get("num_key_value_heads", heads)
    if conversion.permuted and part in ("attn_q", "attn_k"):
        n = heads if part == "attn_q" else shared
        _check_rows(name, rows, n * width)
        return np.arange(n * width).reshape(n, 2, width // 2).swapaxes(1, 2).reshape(-1)
    if conversion.fused and part == "attn_qkv":
        _check_rows(name, rows, (heads + 2 * shared) * width)
        # groups of heads that share a key and a value: [queries of the group, key, value]
        groups = np.arange((heads + 2 * shared) * width).reshape(shared, heads // shared + 2, width)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return np.concatenate([p.reshape(-1) for p in parts])
    return None


def _check_rows(name: str, rows: int, made: int) -> None:
    if rows != made:
        raise DataError(f"tensor {name!r} has {rows} rows where its heads make {made}")
