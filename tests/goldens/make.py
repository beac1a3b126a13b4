"""Makes the goldens: logits of tiny models by the transformers library, with weights that numpy draws.

    pip install torch transformers
    python -m tests.goldens.make [NAME ...]

flashd and its tests need neither torch nor transformers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers.integrations.bitnet import ActQuant

from tests.goldens import folders
from tests.goldens.models import (
    DELTA_DIM,
    EXPERTS,
    GOLDENS,
    HEAD_DIM,
    HEADS,
    HERE,
    HIDDEN,
    KEY_HEADS,
    KV_HEADS,
    LAYERS,
    LLAMA3,
    MAMBA_GROUPS,
    MAMBA_HEADS,
    MAMBA_STATE,
    NEURONS,
    QUERY_RANK,
    RANK,
    SHARED,
    TAPS,
    TOKENS,
    TURNED,
    UNTURNED,
    USED,
    VALUE_HEADS,
    VALUES,
    VOCABULARY,
    WINDOW,
    Golden,
    long_factors,
)

Maker = Callable[[Golden], Any]
"""The configuration of a golden."""

COMMON = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def opt(golden: Golden) -> Any:
    post = golden.keys.get("norm_before") is False
    return transformers.OPTConfig(
        **COMMON, ffn_dim=NEURONS, do_layer_norm_before=not post, word_embed_proj_dim=40 if post else HIDDEN,
        dropout=0.0,
    )  # fmt: skip


PARTLY = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}


def phi(golden: Golden) -> Any:
    return transformers.PhiConfig(
        **COMMON, intermediate_size=NEURONS, num_key_value_heads=KV_HEADS,
        hidden_act=golden.keys.get("hidden_activation", "gelu_new"), rope_parameters=PARTLY,
        partial_rotary_factor=0.5, layer_norm_eps=1e-5,
    )  # fmt: skip


def persimmon(golden: Golden) -> Any:
    return transformers.PersimmonConfig(
        **COMMON, intermediate_size=NEURONS, hidden_act="relu2", qk_layernorm=True, rope_parameters=PARTLY,
        partial_rotary_factor=0.5, layer_norm_eps=1e-5,
    )  # fmt: skip


def falcon(golden: Golden) -> Any:
    two = golden.kv_heads != 1
    return transformers.FalconConfig(
        **COMMON, ffn_hidden_size=NEURONS, multi_query=not two, new_decoder_architecture=two, parallel_attn=True,
        num_kv_heads=golden.kv_heads, num_ln_in_parallel_attn=2 if two else None, bias=False, alibi=False,
        activation=golden.keys.get("hidden_activation", "gelu"), tie_word_embeddings=not two,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip


def nemotron(golden: Golden) -> Any:
    return transformers.NemotronConfig(
        **COMMON, intermediate_size=NEURONS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, hidden_act="relu2",
        rope_parameters=PARTLY, partial_rotary_factor=0.5, norm_eps=1e-5,
    )  # fmt: skip


def llama_like(kind: type, **keys: Any) -> Maker:
    def make(golden: Golden) -> Any:
        rope = {"rope_theta": golden.keys.get("rope.freq_base", 10000.0), "rope_type": "default"}
        return kind(**{
            **COMMON, "intermediate_size": NEURONS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5,
            "head_dim": golden.keys.get("attention.key_length", HEAD_DIM),
            "tie_word_embeddings": "output.weight" not in golden.model,
            "rope_parameters": rope, **keys,
        })  # fmt: skip

    return make


def of_experts(kind: type, **keys: Any) -> Maker:
    def make(golden: Golden) -> Any:
        neurons = golden.layer.get("ffn_up_exps.weight", (0, NEURONS))[1]
        experts = {"num_experts_per_tok": USED, "intermediate_size": neurons}
        return llama_like(kind, **experts, **keys)(golden)

    return make


def rounded(model: Any) -> Any:
    """The model with what goes into the products of its layers rounded to 8 bits a token, as BitNet is trained."""
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            part.register_forward_pre_hook(lambda _, args: (ActQuant.apply(args[0]),))
    return model


def lfm2(golden: Golden) -> Any:
    # two thirds of 300, up to whole blocks of 8, are 200
    assert NEURONS == 200 and isinstance(golden.kv_heads, list)
    return transformers.Lfm2Config(
        **COMMON, intermediate_size=300, block_multiple_of=8, num_key_value_heads=KV_HEADS, norm_eps=1e-5,
        conv_L_cache=TAPS, layer_types=["full_attention" if heads else "conv" for heads in golden.kv_heads],
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )  # fmt: skip


def delta_nets(kind: type, **keys: Any) -> Maker:
    def make(golden: Golden) -> Any:
        rope = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.25}
        return llama_like(
            kind, rope_parameters=rope, linear_conv_kernel_dim=TAPS, linear_key_head_dim=DELTA_DIM,
            linear_value_head_dim=DELTA_DIM, linear_num_key_heads=KEY_HEADS, linear_num_value_heads=VALUE_HEADS,
            layer_types=["full_attention" if i == 2 else "linear_attention" for i in range(LAYERS)], **keys,
        )(golden)  # fmt: skip

    return make


def granite_hybrid(golden: Golden) -> Any:
    assert isinstance(golden.kv_heads, list)
    sizes = {"num_local_experts": EXPERTS} if "expert_count" in golden.keys else {"num_local_experts": 0}
    return of_experts(
        T.GraniteMoeHybridConfig, **GRANITE, **sizes, mamba_d_conv=TAPS, mamba_d_state=MAMBA_STATE,
        mamba_n_groups=MAMBA_GROUPS, mamba_n_heads=MAMBA_HEADS, mamba_expand=2,
        shared_intermediate_size=SHARED if "expert_count" in golden.keys else NEURONS,
        layer_types=["full_attention" if heads else "linear_attention" for heads in golden.kv_heads],
    )(golden)  # fmt: skip


def falcon_h1(golden: Golden) -> Any:
    return llama_like(
        T.FalconH1Config, mamba_d_conv=TAPS, mamba_d_state=MAMBA_STATE, mamba_n_groups=MAMBA_GROUPS, mamba_n_heads=6,
        mamba_d_ssm=96, **folders.FALCON_H1,
    )(golden)  # fmt: skip


def nemotron_h(golden: Golden) -> Any:
    assert isinstance(golden.kv_heads, list)
    kinds = ["full_attention" if heads else "linear_attention" for heads in golden.kv_heads]
    stated = zip(kinds, golden.keys["feed_forward_length"], strict=True)
    return T.NemotronHConfig(
        **{key: value for key, value in COMMON.items() if key != "num_hidden_layers"},
        layers_block_type=["mlp" if neurons else kind for kind, neurons in stated], num_key_value_heads=KV_HEADS,
        head_dim=32, intermediate_size=NEURONS, ssm_state_size=MAMBA_STATE, n_groups=MAMBA_GROUPS, conv_kernel=TAPS,
        mamba_num_heads=6, mamba_head_dim=16,
    )  # fmt: skip


def gemma4(golden: Golden) -> Any:
    keys, shares, mixed = golden.keys, isinstance(golden.kv_heads, list), "expert_count" in golden.keys
    experts = {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": USED, "moe_intermediate_size": 40}
    return transformers.Gemma4TextConfig(
        **COMMON, **(experts if mixed else {}), intermediate_size=SHARED if mixed else NEURONS,
        num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, head_dim=HEAD_DIM,
        global_head_dim=keys["attention.key_length"], sliding_window=WINDOW, final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"] * 2, attention_k_eq_v=shares,
        num_global_key_value_heads=1 if shares else None, vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=keys.get("attention.shared_kv_layers", 0), use_double_wide_mlp=not shares,
        hidden_size_per_layer_input=keys.get("embedding_length_per_layer_input", 0),
    )  # fmt: skip


def gemma3n(golden: Golden) -> Any:
    keys = golden.keys
    pattern = keys["attention.sliding_window_pattern"]
    scales = torch.tensor(keys["activation_sparsity_scale"], dtype=torch.float64)
    return transformers.Gemma3nTextConfig(
        **COMMON, intermediate_size=keys.get("feed_forward_length", NEURONS), num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5, head_dim=32, sliding_window=WINDOW, final_logit_softcapping=30.0,
        layer_types=["sliding_attention" if local else "full_attention" for local in pattern],
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=keys["embedding_length_per_layer_input"],
        num_kv_shared_layers=keys["attention.shared_kv_layers"], altup_num_inputs=keys["altup.num_inputs"],
        laurel_rank=golden.layer["laurel_l.weight"][0],
        activation_sparsity_pattern=torch.special.ndtr(scales).round(decimals=4).tolist(),
    )  # fmt: skip


def lfm2moe(golden: Golden) -> Any:
    assert isinstance(golden.kv_heads, list)
    return transformers.Lfm2MoeConfig(
        **COMMON, intermediate_size=NEURONS, moe_intermediate_size=40, num_key_value_heads=KV_HEADS, norm_eps=1e-5,
        num_experts=EXPERTS, num_experts_per_tok=USED, num_dense_layers=1, use_expert_bias=True, norm_topk_prob=True,
        conv_L_cache=TAPS, layer_types=["full_attention" if heads else "conv" for heads in golden.kv_heads],
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )  # fmt: skip


def sparser(golden: Golden, model: Any) -> None:
    """What those who made Llama's and Mistral's FFNs sparse do to them, in modelling files of their own."""
    threshold = golden.keys.get("hidden_activation_threshold")
    for layer in model.model.layers:
        if golden.keys.get("hidden_activation") == "drelu":
            layer.mlp.up_proj.register_forward_hook(lambda part, args, y: y.relu())
        elif threshold:
            layer.mlp.act_fn = torch.nn.Threshold(threshold, 0.0)


def latent(kind: type, query_rank: int | None, **keys: Any) -> Maker:
    return llama_like(
        kind, num_key_value_heads=HEADS, kv_lora_rank=RANK, q_lora_rank=query_rank, qk_nope_head_dim=UNTURNED,
        qk_rope_head_dim=TURNED, v_head_dim=VALUES, moe_intermediate_size=32,
        n_routed_experts=EXPERTS, num_experts_per_tok=USED, **{"head_dim": TURNED, **keys},
    )  # fmt: skip


def phimoe(golden: Golden) -> Any:
    factors = long_factors(HEAD_DIM // 2)
    stated = {f"{name.split('_')[-1]}_factor": values.tolist() for name, values in factors.items()}
    rope = {
        "rope_theta": 1e6, "rope_type": "longrope", "original_max_position_embeddings": 256, "short_mscale": 1.25,
        "long_mscale": 1.25, **stated,
    }  # fmt: skip
    return of_experts(
        T.PhimoeConfig, num_local_experts=EXPERTS, attention_bias=True, lm_head_bias=True, rope_parameters=rope,
        max_position_embeddings=1024, router_jitter_noise=0.25,
    )(golden)  # fmt: skip


def phi3(golden: Golden) -> Any:
    """The window, or LongRoPE of 12 of a head's 16 dimensions."""
    trained = golden.keys.get("rope.scaling.original_context_length")
    if trained is None:
        return llama_like(T.Phi3Config, sliding_window=WINDOW)(golden)
    factors = {f"{name.split('_')[-1]}_factor": values.tolist() for name, values in long_factors().items()}
    rope = {"rope_theta": 10000.0, "rope_type": "longrope", "partial_rotary_factor": 0.75, **factors}
    return llama_like(
        T.Phi3Config, rope_parameters=rope, max_position_embeddings=golden.keys["context_length"],
        original_max_position_embeddings=trained,
    )(golden)  # fmt: skip


T = transformers
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
ROPE_LLAMA3 = {"rope_theta": 10000.0, "rope_type": "llama3", **LLAMA3}
QUARTER = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.25}
GRANITE = {
    "embedding_multiplier": 6.0, "attention_multiplier": 0.125, "residual_multiplier": 0.5, "logits_scaling": 0.5,
}  # fmt: skip
OF_SHARED = {
    "num_experts": EXPERTS, "num_experts_per_tok": USED, "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": SHARED,
}  # fmt: skip
MAKERS: dict[str, Maker] = {
    "llama3": llama_like(T.LlamaConfig, rope_parameters=ROPE_LLAMA3),
    "mistral": llama_like(T.MistralConfig, sliding_window=WINDOW),
    "llama-relu": llama_like(T.LlamaConfig, hidden_act="relu"),
    "llama-drelu": llama_like(T.MistralConfig, hidden_act="relu", sliding_window=WINDOW),
    "llama-fatrelu": llama_like(T.LlamaConfig, rope_parameters=LINEAR),
    "qwen2-yarn": llama_like(T.Qwen2Config, rope_parameters=YARN),
    "qwen3": llama_like(T.Qwen3Config),
    "mixtral": of_experts(T.MixtralConfig, num_local_experts=EXPERTS),
    "qwen3moe": of_experts(T.Qwen3MoeConfig, num_experts=EXPERTS, moe_intermediate_size=40, norm_topk_prob=True),
    "gpt-oss": of_experts(
        T.GptOssConfig,
        num_local_experts=EXPERTS,
        sliding_window=WINDOW,
        rope_parameters={**YARN, "rope_theta": 150000.0, "truncate": False},
    ),
    "olmoe": of_experts(T.OlmoeConfig, num_experts=EXPERTS, norm_topk_prob=False),
    "smollm3": llama_like(T.SmolLM3Config),
    "granite": llama_like(T.GraniteConfig, **GRANITE, attention_bias=True, mlp_bias=True),
    "granitemoe": of_experts(T.GraniteMoeConfig, **GRANITE, num_local_experts=EXPERTS),
    "granitemoe-shared": of_experts(
        T.GraniteMoeSharedConfig, **GRANITE, num_local_experts=EXPERTS, shared_intermediate_size=SHARED
    ),
    "granitehybrid": granite_hybrid,
    "granitehybrid-dense": granite_hybrid,
    "falcon-h1": falcon_h1,
    "nemotron_h": nemotron_h,
    "llama-bias": llama_like(T.LlamaConfig, attention_bias=True, mlp_bias=True),
    "internlm3": llama_like(T.InternLM3Config),
    "qwen3-bias": llama_like(T.Qwen3Config, attention_bias=True),
    "internlm2": llama_like(T.LlamaConfig),
    "ernie4_5": llama_like(T.Ernie4_5Config),
    "ernie4_5-moe": llama_like(
        T.Ernie4_5_MoeConfig,
        moe_intermediate_size=32,
        moe_num_experts=EXPERTS,
        moe_k=USED,
        moe_num_shared_experts=3,
        moe_layer_start_index=2,
    ),
    "glm4moe": llama_like(
        T.Glm4MoeConfig,
        attention_bias=True,
        use_qk_norm=True,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5},
        moe_intermediate_size=32,
        n_routed_experts=EXPERTS,
        n_shared_experts=3,
        num_experts_per_tok=USED,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
    ),
    "deepseek2": latent(
        T.DeepseekV2Config,
        None,
        rms_norm_eps=1e-6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        rope_parameters={**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek3": latent(
        T.DeepseekV3Config,
        QUERY_RANK,
        rms_norm_eps=1e-6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        n_group=3,
        topk_group=2,
        rope_parameters={**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "glm4-flash": latent(
        T.Glm4MoeLiteConfig,
        QUERY_RANK,
        n_shared_experts=1,
        mlp_layer_types=["dense"] * 2 + ["sparse"] * 2,
        routed_scaling_factor=1.75,
        n_group=2,
        topk_group=1,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    ),
    "mistral4": latent(
        T.Mistral4Config,
        QUERY_RANK,
        head_dim=UNTURNED + TURNED,
        n_shared_experts=1,
        max_position_embeddings=1024,
        rope_parameters={
            **YARN,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "phimoe": phimoe,
    "hunyuan": llama_like(
        T.HunYuanDenseV1Config,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
    ),
    "olmo2": llama_like(T.Olmo2Config),
    "olmo3": llama_like(
        T.Olmo3Config,
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": {**YARN, "rope_theta": 500000.0},
            "sliding_attention": {"rope_theta": 500000.0, "rope_type": "default"},
        },
    ),
    "exaone4": llama_like(
        T.Exaone4Config, rope_parameters=ROPE_LLAMA3, sliding_window=None, layer_types=["full_attention"] * LAYERS
    ),
    "exaone4-window": llama_like(
        T.Exaone4Config,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "stablelm": llama_like(T.StableLmConfig, rope_parameters=QUARTER, use_qkv_bias=True, layer_norm_eps=1e-5),
    "stablelm-parallel": llama_like(
        T.StableLmConfig, rope_parameters=QUARTER, use_parallel_residual=True, layer_norm_eps=1e-5
    ),
    "ministral3": llama_like(
        T.Ministral3Config,
        max_position_embeddings=1024,
        rope_parameters={
            **YARN,
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "gemma": llama_like(T.GemmaConfig),
    "gemma2": llama_like(
        T.Gemma2Config,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=32,
    ),
    "gemma3": llama_like(
        T.Gemma3TextConfig,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    ),
    "gemma3n": gemma3n,
    "gemma3n-shared": gemma3n,
    "gemma4": gemma4,
    "gemma4-keys": gemma4,
    "gemma4-moe": gemma4,
    "lfm2": lfm2,
    "lfm2moe": lfm2moe,
    "qwen35": delta_nets(T.Qwen3_5TextConfig),
    "qwen3next": delta_nets(T.Qwen3NextConfig, **OF_SHARED),
    "qwen35moe": delta_nets(T.Qwen3_5MoeTextConfig, **OF_SHARED),
    "bitnet": llama_like(T.BitNetConfig, hidden_act="relu2"),
    "bitnet-silu": llama_like(T.BitNetConfig, hidden_act="silu"),
    "phi2": phi,
    "phi2-relu": phi,
    "phi3": phi3,
    "phi4-mini": phi3,
    "phi4-mini-long": phi3,
    "falcon": falcon,
    "falcon-two-norms": falcon,
    "persimmon": persimmon,
    "nemotron": nemotron,
    "opt": opt,
    "opt-350m": opt,
}

SPARSER: dict[str, dict[str, Any]] = {
    # TurboSparse-Mistral's, whose relu is dReLU, and ProSparse's
    "llama-drelu": {"model_type": "bamboo"},
    "llama-fatrelu": {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.125},
    "internlm2": {"model_type": "internlm2"},
    # what DeepSeek-V3's own files say, and transformers takes for granted
    "deepseek3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
}
"""Of models that transformers knows by files of their own, what their config.json says."""


def smallthinker() -> np.ndarray:
    """[48, V] float32. transformers does not have SmallThinker: this follows the model's own modelling file.

    The router reads what comes into a layer; of its products the largest are taken, and their sigmoids add up to 1.
    Of each four layers the first sees all tokens and turns nothing, the others see a window.
    """
    w = {name: torch.from_numpy(np.array(values)) for name, values in GOLDENS["smallthinker"].tensors().items()}
    x, at = w["token_embd.weight"][TOKENS], torch.arange(len(TOKENS))
    angle = at[:, None] * 10000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = torch.cat([angle, angle], 1).cos()[None], torch.cat([angle, angle], 1).sin()[None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    for i in range(LAYERS):
        layer = {name.removeprefix(f"blk.{i}."): values for name, values in w.items()}
        scores, chosen = (x @ layer["ffn_gate_inp.weight"].T).topk(USED, -1)
        weights = scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = ((h @ layer[f"attn_{part}.weight"].T).view(len(x), -1, HEAD_DIM).transpose(0, 1) for part in "qkv")
        seen = at[:, None] >= at
        if i % 4:
            q, k, seen = turned(q), turned(k), seen & (at[:, None] - at < WINDOW)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (k, v))
        attention = (q @ k.transpose(1, 2) * HEAD_DIM**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + attention.transpose(0, 1).reshape(len(x), -1) @ layer["attn_output.weight"].T
        h = norm(x, f"blk.{i}.ffn_norm")
        gate, up, down = (layer[f"ffn_{part}_exps.weight"][chosen] for part in ("gate", "up", "down"))
        a = torch.einsum("tkfh,th->tkf", gate, h).relu() * torch.einsum("tkfh,th->tkf", up, h)
        x = x + torch.einsum("tk,tkhf,tkf->th", weights, down, a)
    return np.asarray((norm(x, "output_norm") @ w["output.weight"].T).numpy(), np.float32)


def made(name: str) -> dict[str, Any]:
    """[48, V] float32, by what they are called in the file. Writes what a folder of the model says beside it."""
    if name == "smallthinker":
        return {"logits": smallthinker()}
    golden = GOLDENS[name]
    find, tensors = folders.found(name, golden), golden.tensors()
    config = MAKERS[name](golden)
    kind = T.models.mistral4.modeling_mistral4.Mistral4ForCausalLM if name == "mistral4" else None  # Auto lacks it
    make = kind._from_config if kind else transformers.AutoModelForCausalLM.from_config
    model = make(config, attn_implementation="eager", dtype=torch.float32)
    state = {key: torch.from_numpy(np.array(find(key, tensors))) for key in model.state_dict()}
    for key, value in model.state_dict().items():
        assert value.shape == state[key].shape, f"{key}: {tuple(value.shape)}, not {tuple(state[key].shape)}"
    model.load_state_dict(state)
    write_folder(name, model)
    if name in SPARSER:
        sparser(golden, model)
    out: dict[str, Any] = {"logits": logits(model)}
    return out | {"rounded": logits(rounded(model))} if golden.ternary else out


def write_folder(name: str, model: Any) -> None:
    """Keeps the config.json and the tensors' names that a folder of the model has."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text()) | SPARSER.get(name, {})
        names = sorted(load_file(Path(folder) / "model.safetensors"))
    if config["model_type"] == "bamboo":
        names += [f"model.layers.{i}.mlp.predictor.fc{n}.weight" for i in range(LAYERS) for n in (1, 2)]
    if config["model_type"] == "internlm2":
        names = sorted({folders.internlm2_name(name) for name in names})
    (HERE / f"{name}.json").write_text(json.dumps({"config": config, "tensors": names}, indent=1) + "\n")


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.eval()(torch.from_numpy(TOKENS)[None]).logits[0].numpy(), np.float32)


def main() -> None:
    for name in sys.argv[1:] or [*MAKERS, "smallthinker"]:
        arrays = made(name)
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        print(f"{name}: {', '.join(arrays)}, {np.abs(arrays['logits']).max():.2f} at the most")


if __name__ == "__main__":
    main()
