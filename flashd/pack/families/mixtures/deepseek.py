"""DeepSeek-V2 and V3, GLM-4.7-Flash and Mistral 4: multi-head latent attention, shared experts, dense first layers.

Sources: transformers' modeling_deepseek_v2.py, modeling_deepseek_v3.py and modeling_glm4_moe_lite.py, and llama.cpp's
deepseek2.cpp for the layout of a GGUF file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder, Mixture
from flashd.pack.families.llamas import ministral
from flashd.pack.families.rope import yarn_length

SIGMOID = 2
"""Of the gguf package's ExpertGatingFuncType."""

REFUSED = {
    "attention_bias": (False, "attention with biases"),
    "mlp_bias": (False, "FFNs with biases"),
    "rope_interleave": (True, "rotary pairs in halves"),
    "moe_layer_freq": (1, "layers without experts between others"),
    "scoring_func": ("softmax", "another score of experts"),
}
"""Of what config.json may say: what is supported, and what anything else means."""

CHOICE_OF_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""What its config.json says of how experts are chosen. transformers takes it for granted."""


def adapt(config: Config, path: Path) -> Config:
    """The configuration with the sizes of heads as GGUF has them, and what YaRN makes of their products."""
    full: dict[str, Any] = dict(config)
    for key, (known, what) in REFUSED.items():
        if full.pop(key, known) not in (known, None):
            raise DataError(f"{path}: {what} ({key}) is not supported here")
    turned, rank = int(full["qk_rope_head_dim"]), int(full["kv_lora_rank"])
    keys = turned + int(full["qk_nope_head_dim"])
    full |= {"head_dim": turned, "latent_row": rank + turned, "latent_keys": keys, "latent_heads": 1}
    rope = full.get("rope_parameters") or full.get("rope_scaling") or {}
    if all_dim := rope.get("mscale_all_dim"):
        factor = rope.get("factor") or full["max_position_embeddings"] / rope["original_max_position_embeddings"]
        full["latent_scale"] = yarn_length(factor, all_dim) ** 2 / math.sqrt(keys)
    if full.pop("topk_method", "greedy") == "greedy" and full["model_type"] == "deepseek_v2":
        full["n_group"] = full["topk_group"] = 1
    return full


def adapt_v3(config: Config, path: Path) -> Config:
    """The same of DeepSeek-V3, whose scores are sigmoids, and whose experts are chosen by these and a bias."""
    full: dict[str, Any] = dict(config)
    for key, known in CHOICE_OF_V3.items():
        if full.pop(key, known) not in (known, None):
            raise DataError(f"{path}: another choice of experts than DeepSeek-V3's ({key}) is not supported here")
    return {**adapt(full, path), "expert_gating_func": SIGMOID}


def adapt_lite(config: Config, path: Path) -> Config:
    """The same of GLM-4.7-Flash, which lists the layers without experts, and whose scores are sigmoids."""
    kinds = config.get("mlp_layer_types") or ["dense", *["sparse"] * (config["num_hidden_layers"] - 1)]
    first = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if set(kinds[first:]) != {"sparse"} or set(kinds[:first]) - {"dense"}:
        raise DataError(f"{path}: layers without experts behind others (mlp_layer_types)")
    return {**adapt(config, path), "first_k_dense_replace": first, "expert_gating_func": SIGMOID}


def adapt_mistral(config: Config, path: Path) -> Config:
    """The same of Mistral 4, whose queries grow with a text's length, and which turns what is to be turned whole."""
    full = dict(ministral.adapt(config, path))
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := full.get(key), dict):
            full[key] = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    return adapt(full, path)


KEYS = {
    "attention.kv_lora_rank": "kv_lora_rank", "attention.q_lora_rank": "q_lora_rank",
    "attention.key_length": "latent_row", "attention.value_length": "kv_lora_rank",
    "attention.key_length_mla": "latent_keys", "attention.value_length_mla": "v_head_dim",
    "attention.head_count_kv": "latent_heads", "attention.scale": "latent_scale",
    "rope.dimension_count": "qk_rope_head_dim", "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts", "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor", "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}  # fmt: skip
SCORED = KEYS | {"expert_gating_func": "expert_gating_func"}
TENSORS = {"model.layers.{bid}.mlp.gate.e_score_correction_bias": "blk.{bid}.exp_probs_b.bias"}
COMMON = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
V2 = COMMON | {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 0, "norm_topk_prob": False,
    "moe_intermediate_size": 1407,
}  # fmt: skip
V3 = COMMON | {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4,
}  # fmt: skip
"""Without the rank of queries: a model that has none says null, which is read as if it were not there."""

FLASH = COMMON | {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 202752, "qk_nope_head_dim": 192, "v_head_dim": 256,
    "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True, "moe_intermediate_size": 1536,
    "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "q_lora_rank": 768,
}  # fmt: skip

MISTRAL = COMMON | {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 1048576, "kv_lora_rank": 256, "q_lora_rank": 1024,
    "qk_nope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1,
    "first_k_dense_replace": 0, "norm_topk_prob": True, "moe_intermediate_size": 2048, "num_experts_per_tok": 4,
}  # fmt: skip
READS = (
    "attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla", "expert_group_count",
    "attention.value_length_mla", "rope.scaling.yarn_log_multiplier", "nextn_predict_layers",
)  # fmt: skip

FAMILIES = (
    Family(
        "deepseek2", "DeepSeek-V2, DeepSeek-V2-Lite, DeepSeek-V3, GLM-4.7-Flash", "tiny",
        latent=True, mixture=Mixture(normalised=False, leaned=True, leading=True, shared=True, grouped=True),
        reads=READS,
        folders=(
            Folder("deepseek_v2", adapt=adapt, defaults=V2, keys=KEYS, tensors=TENSORS),
            Folder("deepseek_v3", adapt=adapt_v3, defaults=V3, keys=SCORED, tensors=TENSORS),
            Folder("glm4_moe_lite", adapt=adapt_lite, defaults=FLASH, keys=SCORED, tensors=TENSORS),
        ),
    ),
    Family(
        "mistral4", "Mistral Small 4", "tiny",
        latent=True, mixture=Mixture(leading=True, shared=True, grouped=True, best=2),
        reads=(*READS, "attention.temperature_scale"),
        folders=(
            Folder(
                "mistral4", adapt=adapt_mistral, defaults=MISTRAL,
                keys=KEYS | {"attention.temperature_scale": "llama_4_scaling_beta"},
                tensors={"model.layers.{bid}.mlp.experts.down_proj": "blk.{bid}.ffn_down_exps.weight"},
                joined={
                    "model.layers.{bid}.mlp.experts.gate_up_proj": (
                        "blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps",
                    ),
                },
            ),
        ),
    ),
)  # fmt: skip
