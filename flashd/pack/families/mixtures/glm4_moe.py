"""GLM-4.5 and 4.6: groups of experts, a bias that only chooses, half of a head turned, norms that may be there."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder, Mixture

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_routed_experts": 128, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip
KEYS = {
    "expert_count": "n_routed_experts", "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace", "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
}  # fmt: skip

TENSORS = {"model.layers.{bid}.mlp.gate.e_score_correction_bias": "blk.{bid}.exp_probs_b.bias"}

FAMILIES = (
    Family(
        "glm4moe", "GLM-4.5-Air, GLM-4.5, GLM-4.6", "tiny",
        may_have=("query", "key", "qkv"), names={"ffn_norm": "post_attention_norm"},
        mixture=Mixture(leaned=True, leading=True, shared=True, grouped=True, scores="sigmoid"),
        reads=("expert_group_count", "nextn_predict_layers"),
        folders=(Folder("glm4_moe", defaults=DEFAULTS, keys=KEYS, tensors=TENSORS),),
    ),
)  # fmt: skip
