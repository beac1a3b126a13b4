"""A Hugging Face folder's config.json, in the keys that a GGUF file of the same model has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashd.pack.families.family import Config, Folder
from flashd.pack.families.registry import FOLDERS, SEEING
from flashd.pack.sources.folder_rope import rotary_keys, unknown_rope

MOST_WIDTH = 1 << 16
"""Numbers of a head."""

KEYS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    # GGUF has no key for it: the architecture says it all there
    "hidden_activation": ("hidden_activation", "hidden_act", "activation_function", "activation"),
}
"""Of each key, below the architecture's name, what most families call it in config.json."""

READ = frozenset((
    "rope_theta", "rope_parameters", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
    "original_max_position_embeddings", "query_pre_attn_scalar", "tie_word_embeddings",
))  # fmt: skip
"""Other names of config.json that are read."""

CHANGES_ANSWERS = re.compile(r"rope|rotary|scal(e|ing|ar)|multiplier|softcap|clip|alibi")
"""What the names of such properties have in them. Thousands of others say nothing of answers."""

INERT = (None, 0, 1)
"""Values of a scale, a bound or a flag that change nothing."""


@dataclass(frozen=True)
class FolderModel:
    """What a folder's config.json says, completed by what its family leaves out."""

    architecture: str  # in GGUF
    folder: Folder
    config: Config
    unknown: tuple[str, ...] = ()  # what it says that changes answers and that nothing reads, in words

    @property
    def layers(self) -> int:
        return int(self.config.get("num_hidden_layers", 0))

    @property
    def head_dim(self) -> int:
        """The width of a head. Raises ValueError for one that no model has, before a table of it is made."""
        heads = max(1, self.config.get("num_attention_heads", 1))
        width = int(self.config.get("head_dim") or self.config.get("hidden_size", 0) // heads)
        if not 0 <= width <= MOST_WIDTH:
            raise ValueError(f"heads of {width} numbers; {MOST_WIDTH} at the most")
        return width


def folder_model(stated: Config, path: Path) -> FolderModel:
    """The model of a config.json; one of an unknown type is left for the families to refuse. Raises DataError."""
    config = _text_part(stated)
    kind = str(config.get("model_type"))
    if kind not in FOLDERS:
        return FolderModel(kind, Folder(kind), config)
    architecture, folder = FOLDERS[kind]
    full = {**folder.defaults, **{key: value for key, value in config.items() if value is not None}}
    if folder.plain and not full.get("num_local_experts"):
        folder = folder.plain
    if "sliding_window" in config and config["sliding_window"] is None:
        full.pop("sliding_window", None)  # transformers, too, takes null for no window, whatever its default is
    if "hidden_act" in full:
        full["hidden_act"] = folder.activations.get(full["hidden_act"], full["hidden_act"])
    adapted = folder.adapt(_of_every_layer(full), path)
    return FolderModel(architecture, folder, adapted, (*_unknown_names(adapted, folder), *unknown_rope(adapted)))


def _of_every_layer(config: Config) -> Config:
    """Numbers that are lists of one a layer, all alike, as that one number."""
    names = {name for known in KEYS.values() for name in known}
    alike = {n: v[0] for n, v in config.items() if n in names and isinstance(v, list) and len(set(map(str, v))) == 1}
    return {**config, **alike}


def _unknown_names(config: Config, folder: Folder) -> list[str]:
    """The properties that change answers and that nothing reads, in words."""
    known = {name for names in KEYS.values() for name in names} | READ | set(folder.keys.values())
    return [
        f"flashd does not know what {name!r} means (its value: {str(value)[:60]})"
        for name, value in config.items()
        if name not in known and CHANGES_ANSWERS.search(name) and value not in INERT
    ]


def _text_part(config: Config) -> Config:
    """The configuration of a text model, out of that of one that also sees."""
    inner, kind = config.get("text_config"), SEEING.get(str(config.get("model_type")))
    if kind is None or not isinstance(inner, dict):
        return config
    outer = {key: value for key, value in config.items() if key != "text_config"}
    stated = inner.get("model_type")
    return {**outer, **inner, "model_type": stated if stated in FOLDERS else kind}


def model_keys(model: FolderModel) -> dict[str, Any]:
    """The GGUF keys, below the architecture's name, of a folder."""
    config, own = model.config, {key: (name,) for key, name in model.folder.keys.items()}
    names = {**KEYS, **{key: (*name, *KEYS.get(key, ())) for key, name in own.items()}}
    out = {key: next((config[n] for n in known if n in config), None) for key, known in names.items()}
    out |= _window(config) | rotary_keys(config, model.head_dim)
    if scalar := config.get("query_pre_attn_scalar"):
        out["attention.scale"] = float(scalar) ** -0.5
    return {key: value for key, value in out.items() if value is not None}


def _window(config: Config) -> dict[str, Any]:
    """Which layers see only so many tokens: True in the pattern for those that do."""
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers", 0)
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
