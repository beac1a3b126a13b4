"""Gemma 1, 2, 3 and 3n.

Sources for 3n: transformers' modeling_gemma3n.py, and llama.cpp's src/models/gemma3n.cpp for the layout of a file.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256,
    "max_position_embeddings": 8192,
}  # fmt: skip
GEMMA_2 = {**DEFAULTS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA_3 = {**GEMMA_2, "max_position_embeddings": 131072, "num_attention_heads": 8, "rope_theta": 1e6}
GEMMA_3N = {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256,
    "max_position_embeddings": 32768, "num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 2,
    "sliding_window": 512, "final_logit_softcapping": 30.0, "hidden_size": 2048, "intermediate_size": 16384,
    "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 15, "altup_num_inputs": 4, "altup_active_idx": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip
GEMMA_3N_KEYS = {
    "attention.shared_kv_layers": "num_kv_shared_layers", "altup.num_inputs": "altup_num_inputs",
    "altup.active_idx": "altup_active_idx", "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "activation_sparsity_scale": "activation_sparsity_scale",
}  # fmt: skip
STATES = {
    "model.altup_projections.{bid}": "altup_proj.{bid}",
    "model.altup_unembed_projections.{bid}": "altup_unembd_proj.{bid}",
    "model.layers.{bid}.altup.correct_output_scale": "blk.{bid}.altup_correct_scale.weight",
}  # fmt: skip


def adapt_3n(config: Config, path: Path) -> Config:
    """The configuration with its bounds as GGUF has them, and a kind for each layer."""
    full: dict[str, Any] = dict(config)
    if full.pop("attention_bias", None):
        raise DataError(f"{path}: biases in the attention (attention_bias) are not supported in Gemma 3n")
    if full.pop("altup_correct_scale", True) is not True:
        raise DataError(f"{path}: states that are not scaled (altup_correct_scale) are not supported in Gemma 3n")
    full.pop("altup_coef_clip", None)  # of training
    layers, shares = int(full["num_hidden_layers"]), full.pop("activation_sparsity_pattern", None)
    if shares is None:
        shares = [0.95 if layers > 10 and i < 10 else 0.0 for i in range(layers)]
    shares = shares if isinstance(shares, list) else [shares] * layers
    if not all(0 <= share < 1 for share in shares):
        raise DataError(f"{path}: shares of neurons that rest (activation_sparsity_pattern) are {str(shares)[:60]}")
    full["activation_sparsity_scale"] = [NormalDist().inv_cdf(s) if s else float("-inf") for s in shares]
    if full.get("layer_types") is None:
        full["layer_types"] = ["sliding_attention" if (i + 1) % 5 else "full_attention" for i in range(layers)]
    return full


FAMILIES = (
    Family(
        "gemma", "Gemma", "tiny",
        activation="gelu_tanh", scaled_embeddings=True,
        folders=(Folder("gemma", shift=1.0, defaults={**DEFAULTS, "num_key_value_heads": 16}),),
    ),
    Family(
        "gemma2", "Gemma 2", "tiny",
        activation="gelu_tanh", scaled_embeddings=True, global_every=2, scale_by_width=(46,),
        norms=("attention", "attention_branch", "ffn", "ffn_branch", "final"),
        folders=(Folder("gemma2", shift=1.0, defaults=GEMMA_2),),
    ),
    Family(
        "gemma3", "Gemma 3", "Gemma-3-270M, tiny",
        activation="gelu_tanh", scaled_embeddings=True, global_every=6, local_base=10000.0, scale_by_width=(62,),
        norms=("attention", "query", "key", "attention_branch", "ffn", "ffn_branch", "final"),
        folders=(Folder("gemma3_text", seeing=("gemma3",), shift=1.0, defaults=GEMMA_3),),
    ),
    Family(
        "gemma3n", "Gemma 3n, its text part", "tiny",
        activation="gelu_tanh", scaled_embeddings=True, global_every=5, local_base=10000.0, attention_scale=1.0,
        norms=(
            "attention", "query", "key", "laurel_branch", "attention_branch", "ffn", "ffn_branch", "token_branch",
            "final",
        ),
        norm_values=True, borrows=True, sized_ffns=True, token_inputs=True, streams=True, bounded=True,
        reads=tuple(GEMMA_3N_KEYS),
        folders=(
            Folder(
                "gemma3n_text", seeing=("gemma3n",), adapt=adapt_3n, keys=GEMMA_3N_KEYS, tensors=STATES,
                defaults=GEMMA_3N,
            ),
        ),
    ),
)  # fmt: skip
