"""Makes the goldens: logits of tiny models by the transformers library, with weights that numpy draws.

    pip install torch transformers
    python -m tests.goldens.make [NAME ...]

flashd and its tests need neither torch nor transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.integrations.bitnet import ActQuant

from tests.goldens.models import (
    EXPERTS,
    GOLDENS,
    HEAD_DIM,
    HEADS,
    HERE,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LLAMA3,
    NEURONS,
    TOKENS,
    USED,
    VOCABULARY,
    WINDOW,
    Golden,
)

Tensors = dict[str, np.ndarray]
Rename = Callable[[str, Tensors], np.ndarray]
Maker = Callable[[Golden], tuple[Any, Rename]]
COMMON = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def by_map(golden: Golden, special: dict[str, str] | None = None) -> Rename:
    """Names with the parts that `special` names replaced, else as the gguf package maps them."""
    architectures = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = architectures.get(golden.architecture, gguf.MODEL_ARCH.LLAMA)
    known = gguf.get_tensor_name_map(kind, LAYERS)

    def find(name: str, tensors: Tensors) -> np.ndarray:
        if name == "lm_head.weight":
            return tensors.get("output.weight", tensors["token_embd.weight"])
        ours = name
        for theirs, part in (special or {}).items():
            ours = ours.replace(theirs, part)
        return tensors[ours if ours in tensors else str(known.get_name(name, try_suffixes=(".weight", ".bias")))]

    return find


OPT = {
    "model.decoder.embed_tokens": "token_embd", "model.decoder.embed_positions": "position_embd",
    "model.decoder.project_in": "project_in", "model.decoder.project_out": "project_out",
    "model.decoder.final_layer_norm": "output_norm", "model.decoder.layers.": "blk.",
    "self_attn_layer_norm": "attn_norm", "final_layer_norm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output",
    "fc1": "ffn_up", "fc2": "ffn_down",
}  # fmt: skip


def opt(golden: Golden) -> tuple[Any, Rename]:
    post = golden.keys.get("norm_before") is False
    config = transformers.OPTConfig(
        **COMMON, ffn_dim=NEURONS, do_layer_norm_before=not post, word_embed_proj_dim=40 if post else HIDDEN,
        dropout=0.0,
    )  # fmt: skip
    return config, by_map(golden, OPT)


def halves(find: Rename) -> Rename:
    """Undoes GGUF's order of llama's query and key rows."""

    def found(name: str, tensors: Tensors) -> np.ndarray:
        values = find(name, tensors)
        if "q_proj" not in name and "k_proj" not in name:
            return values
        heads = HEADS if "q_proj" in name else KV_HEADS
        return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)

    return found


def less_one(find: Rename) -> Rename:
    """GGUF has the weights of norms with 1 added."""

    def found(name: str, tensors: Tensors) -> np.ndarray:
        return find(name, tensors) - (1.0 if "norm" in name and name.endswith(".weight") else 0.0)

    return found


def by_group(find: Rename, kv_heads: int) -> Rename:
    """Queries, keys and values by groups of heads that share a key, where GGUF has all queries first."""

    def found(name: str, tensors: Tensors) -> np.ndarray:
        values = find(name, tensors)
        if "query_key_value" not in name:
            return values
        q, k, v = np.split(values.reshape(-1, HEAD_DIM, *values.shape[1:]), [HEADS, HEADS + kv_heads])
        q = q.reshape(kv_heads, HEADS // kv_heads, *q.shape[1:])
        return np.concatenate([q, k[:, None], v[:, None]], axis=1).reshape(values.shape)

    return found


def gemma(kind: type, **keys: Any) -> Maker:
    def make(golden: Golden) -> tuple[Any, Rename]:
        config, find = llama_like(kind, **keys)(golden)
        return config, less_one(find)

    return make


PHI = {
    "model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip

PERSIMMON = {
    "model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.query_key_value": "attn_qkv", "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm", "self_attn.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip

PARTLY = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}


def phi(golden: Golden) -> tuple[Any, Rename]:
    config = transformers.PhiConfig(
        **COMMON, intermediate_size=NEURONS, num_key_value_heads=KV_HEADS, hidden_act="gelu_new",
        rope_parameters=PARTLY, partial_rotary_factor=0.5, layer_norm_eps=1e-5,
    )  # fmt: skip
    return config, by_map(golden, PHI)


def persimmon(golden: Golden) -> tuple[Any, Rename]:
    config = transformers.PersimmonConfig(
        **COMMON, intermediate_size=NEURONS, hidden_act="relu2", qk_layernorm=True, rope_parameters=PARTLY,
        partial_rotary_factor=0.5, layer_norm_eps=1e-5,
    )  # fmt: skip
    return config, by_group(by_map(golden, PERSIMMON), HEADS)


def falcon(golden: Golden) -> tuple[Any, Rename]:
    two = golden.kv_heads > 1
    config = transformers.FalconConfig(
        **COMMON, ffn_hidden_size=NEURONS, multi_query=not two, new_decoder_architecture=two, parallel_attn=True,
        num_kv_heads=golden.kv_heads, num_ln_in_parallel_attn=2 if two else None, bias=False, alibi=False,
        activation=golden.keys.get("hidden_activation", "gelu"), tie_word_embeddings=not two,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    return config, by_group(by_map(golden), golden.kv_heads)


def nemotron(golden: Golden) -> tuple[Any, Rename]:
    config = transformers.NemotronConfig(
        **COMMON, intermediate_size=NEURONS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, hidden_act="relu2",
        rope_parameters=PARTLY, partial_rotary_factor=0.5, norm_eps=1e-5,
    )  # fmt: skip
    return config, less_one(by_map(golden))


def llama_like(kind: type, permuted: bool = False, **keys: Any) -> Maker:
    def make(golden: Golden) -> tuple[Any, Rename]:
        rope = {"rope_theta": golden.keys.get("rope.freq_base", 10000.0), "rope_type": "default"}
        config = kind(**{
            **COMMON, "intermediate_size": NEURONS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5,
            "head_dim": golden.keys.get("attention.key_length", HEAD_DIM),
            "tie_word_embeddings": "output.weight" not in golden.model,
            "rope_parameters": rope, **keys,
        })  # fmt: skip
        find = by_map(golden)
        return config, halves(find) if permuted else find

    return make


def bitnet(golden: Golden) -> tuple[Any, Rename]:
    known = golden.architecture == "bitnet"
    config, find = llama_like(transformers.BitNetConfig, hidden_act="silu" if known else "relu2")(golden)
    names = {"model.layers.": "blk.", "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
    own = by_map(golden, names)
    return config, lambda name, tensors: own(name, tensors) if "sub_norm" in name else find(name, tensors)


def rounded(model: Any) -> Any:
    """The model with what goes into the products of its layers rounded to 8 bits a token, as BitNet is trained."""
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            part.register_forward_pre_hook(lambda _, args: (ActQuant.apply(args[0]),))
    return model


def of_experts(kind: type, permuted: bool = False, **keys: Any) -> Maker:
    """A mixture: transformers has gate and up of all experts in one tensor."""

    def make(golden: Golden) -> tuple[Any, Rename]:
        experts = {"num_experts_per_tok": USED, "intermediate_size": golden.layer["ffn_up_exps.weight"][1]}
        config, find = llama_like(kind, permuted, **experts, **keys)(golden)

        def found(name: str, tensors: Tensors) -> np.ndarray:
            layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
            if name.endswith("experts.gate_up_proj"):
                return np.concatenate([tensors[f"{layer}ffn_{part}_exps.weight"] for part in ("gate", "up")], axis=1)
            if name.endswith("experts.down_proj"):
                return tensors[f"{layer}ffn_down_exps.weight"]
            if name.endswith("mlp.gate.weight"):
                return tensors[f"{layer}ffn_gate_inp.weight"]
            return find(name, tensors)

        return config, found

    return make


T = transformers
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MAKERS: dict[str, Maker] = {
    "llama3": llama_like(
        T.LlamaConfig, True, rope_parameters={"rope_theta": 10000.0, "rope_type": "llama3", **LLAMA3}
    ),
    "mistral": llama_like(T.MistralConfig, True, sliding_window=WINDOW),
    "llama-relu": llama_like(T.LlamaConfig, True, hidden_act="relu"),
    "qwen2-yarn": llama_like(T.Qwen2Config, rope_parameters=YARN),
    "qwen3": llama_like(T.Qwen3Config),
    "mixtral": of_experts(T.MixtralConfig, True, num_local_experts=EXPERTS),
    "qwen3moe": of_experts(T.Qwen3MoeConfig, num_experts=EXPERTS, moe_intermediate_size=40, norm_topk_prob=True),
    "olmoe": of_experts(T.OlmoeConfig, num_experts=EXPERTS, norm_topk_prob=False),
    "smollm3": llama_like(T.SmolLM3Config, True),
    "gemma": gemma(T.GemmaConfig),
    "gemma2": gemma(
        T.Gemma2Config,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=32,
    ),
    "gemma3": gemma(
        T.Gemma3TextConfig,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    ),
    "bitnet": bitnet,
    "bitnet-silu": bitnet,
    "phi2": phi,
    "falcon": falcon,
    "falcon-two-norms": falcon,
    "persimmon": persimmon,
    "nemotron": nemotron,
    "opt": opt,
    "opt-350m": opt,
}


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
    """[48, V] float32, by what they are called in the file."""
    if name == "smallthinker":
        return {"logits": smallthinker()}
    golden = GOLDENS[name]
    config, find = MAKERS[name](golden)
    tensors = golden.tensors()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    state = {key: torch.from_numpy(np.array(find(key, tensors))) for key in model.state_dict()}
    for key, value in model.state_dict().items():
        assert value.shape == state[key].shape, f"{key}: {tuple(value.shape)}, not {tuple(state[key].shape)}"
    model.load_state_dict(state)
    out: dict[str, Any] = {"logits": logits(model)}
    return out | {"rounded": logits(rounded(model))} if golden.ternary else out


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
