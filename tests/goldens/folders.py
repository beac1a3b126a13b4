"""The goldens as Hugging Face folders: the same weights, named and ordered as the transformers library saves them.

`NAME.json` beside this file holds the config.json and the names of the tensors that it saved, see make.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from flashd.pack.sources.gguf import GgufModel
from tests.goldens.models import (
    DELTA_DIM,
    GOLDENS,
    HEAD_DIM,
    HEADS,
    HERE,
    HIDDEN,
    KEY_HEADS,
    KV_HEADS,
    LAYERS,
    MAMBA_GROUPS,
    MAMBA_STATE,
    VALUE_HEADS,
    Floats,
    Golden,
)

Tensors = dict[str, Floats]
Rename = Callable[[str, Tensors], Floats]
"""The values of a tensor that transformers names so, out of those that GGUF names."""

OPT = {
    "model.decoder.embed_tokens": "token_embd", "model.decoder.embed_positions": "position_embd",
    "model.decoder.project_in": "project_in", "model.decoder.project_out": "project_out",
    "model.decoder.final_layer_norm": "output_norm", "model.decoder.layers.": "blk.",
    "self_attn_layer_norm": "attn_norm", "final_layer_norm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output",
    "fc1": "ffn_up", "fc2": "ffn_down",
}  # fmt: skip

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

BITNET = {"model.layers.": "blk.", "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}

DELTA_NETS = {"model.layers.": "blk."} | {
    f"linear_attn.{theirs}": ours
    for theirs, ours in {
        "in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_b": "ssm_beta", "in_proj_a": "ssm_alpha",
        "conv1d": "ssm_conv1d", "norm": "ssm_norm", "out_proj": "ssm_out", "A_log": "ssm_a", "dt_bias": "ssm_dt.bias",
        "in_proj_ba": "ssm_ba",
    }.items()
}  # fmt: skip

MAMBA = {
    "model.layers.": "blk.", "mamba.dt_bias": "ssm_dt.bias", "mamba.A_log": "ssm_a", "mamba.D": "ssm_d",
    "mamba.in_proj": "ssm_in", "mamba.conv1d": "ssm_conv1d", "mamba.out_proj": "ssm_out", "mamba.norm": "ssm_norm",
}  # fmt: skip

NEMOTRON_H = {name.replace("mamba.", "mixer."): part for name, part in MAMBA.items()} | {
    "backbone.layers.": "blk.", "mixer.q_proj": "attn_q", "mixer.k_proj": "attn_k", "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output", "mixer.up_proj": "ffn_up", "mixer.down_proj": "ffn_down",
}  # fmt: skip

LFM2 = {f"model.layers.{i}.conv.": f"blk.{i}.shortconv." for i in range(LAYERS)} | {
    f"model.layers.{i}.feed_forward.expert_bias": f"blk.{i}.exp_probs_b.bias" for i in range(LAYERS)
}

GEMMA_4 = {
    f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}"
    for i in range(LAYERS)
    for theirs, ours in {
        "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight", "experts.down_proj": "ffn_down_exps.weight",
    }.items()
}  # fmt: skip

EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(?:(\d+)\.)?(\w+)(?:\.weight)?")
GRANITE = re.compile(r"(block_sparse_moe)\.(input_linear|output_linear)\.weight")
PARTS = {
    "output_linear": "down",
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}


def found(name: str, golden: Golden) -> Rename:
    """Where the golden called `name` has what transformers asks for."""
    match golden.architecture:
        case "internlm2":
            find = internlm2(by_map(golden))
        case "llama" | "smollm3" | "granite" | "granitemoe" | "mistral3":
            find = halves(by_map(golden))
        case "gemma" | "gemma2" | "gemma3" | "nemotron":
            find = less_one(by_map(golden))
        case "granitehybrid":
            find = state_spaces(halves(by_map(golden, MAMBA)))
        case "falcon-h1":
            find = multiplied(state_spaces(by_map(golden, MAMBA)))
        case "nemotron_h":
            find = state_spaces(by_map(golden, NEMOTRON_H))
        case "falcon":
            assert isinstance(golden.kv_heads, int)
            find = by_group(by_map(golden), golden.kv_heads)
        case "persimmon":
            find = by_group(by_map(golden, PERSIMMON), HEADS)
        case "phi2":
            find = by_map(golden, PHI)
        case "opt":
            find = by_map(golden, OPT)
        case "gemma3n":
            find = states(by_map(golden))
        case "gemma4":
            find = by_map(golden, GEMMA_4)
        case "lfm2" | "lfm2moe":
            find = short_convolutions(by_map(golden, LFM2))
        case "gpt-oss":
            return gpt_oss(by_map(golden))
        case "qwen3next":
            find = joined_delta_nets(by_map(golden, DELTA_NETS))
        case "qwen35" | "qwen35moe":
            find = delta_nets(by_map(golden, DELTA_NETS))
        case "deepseek2" | "mistral4":
            find = latents(by_map(golden))
        case "bitnet" | "bitnet-b1.58":
            find = bitnet(golden)
        case _:
            find = by_map(golden)
    return of_experts(find) if "expert_count" in golden.keys or golden.architecture == "granitehybrid" else find


def by_map(golden: Golden, special: dict[str, str] | None = None) -> Rename:
    """Names with the parts that `special` names replaced, else as the gguf package maps them."""
    architectures = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = architectures.get(golden.architecture, gguf.MODEL_ARCH.LLAMA)
    known = gguf.get_tensor_name_map(kind, golden.layers)

    def find(name: str, tensors: Tensors) -> Floats:
        if name == "lm_head.weight":
            return tensors.get("output.weight", tensors["token_embd.weight"])
        if name.endswith(".layer_scalar"):
            return tensors[f"{known.get_name(name)}.weight"]
        ours = name
        for theirs, part in (special or {}).items():
            ours = ours.replace(theirs, part)
        if ours in tensors:
            return tensors[ours]
        mapped = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped, f"{name}: the gguf package has no name for it in {golden.architecture!r}; `found` is to say it"
        return tensors[mapped]

    return find


def halves(find: Rename) -> Rename:
    """Undoes GGUF's order of llama's query and key rows."""

    def halved(name: str, tensors: Tensors) -> Floats:
        values = find(name, tensors)
        if "q_proj" not in name and "k_proj" not in name:
            return values
        heads = HEADS if "q_proj" in name else KV_HEADS
        return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)

    return halved


def less_one(find: Rename) -> Rename:
    """GGUF has the weights of norms with 1 added."""

    def less(name: str, tensors: Tensors) -> Floats:
        one = np.float32("norm" in name and name.endswith(".weight"))
        return np.asarray(find(name, tensors) - one, np.float32)

    return less


def by_group(find: Rename, kv_heads: int) -> Rename:
    """Queries, keys and values by groups of heads that share a key, where GGUF has all queries first."""

    def grouped(name: str, tensors: Tensors) -> Floats:
        values = find(name, tensors)
        if "query_key_value" not in name:
            return values
        q, k, v = np.split(values.reshape(-1, HEAD_DIM, *values.shape[1:]), [HEADS, HEADS + kv_heads])
        q = q.reshape(kv_heads, HEADS // kv_heads, *q.shape[1:])
        return np.concatenate([q, k[:, None], v[:, None]], axis=1).reshape(values.shape)

    return grouped


STATE = re.compile(r"model\.(altup_projections|altup_unembed_projections)\.(\d+)\.weight")


def states(find: Rename) -> Rename:
    """transformers has the matrices of each state by themselves."""

    def of_states(name: str, tensors: Tensors) -> Floats:
        if at := STATE.fullmatch(name):
            stack = {"altup_projections": "altup_proj", "altup_unembed_projections": "altup_unembd_proj"}[at[1]]
            return np.asarray(tensors[f"{stack}.weight"][int(at[2])])
        if name.endswith("correct_output_scale"):
            return tensors[f"blk.{name.split('.')[2]}.altup_correct_scale.weight"]
        return find(name, tensors)

    return of_states


def short_convolutions(find: Rename) -> Rename:
    """transformers has a convolution's weights as Conv1d has them."""

    def convolved(name: str, tensors: Tensors) -> Floats:
        values = find(name, tensors)
        return values[:, None] if name.endswith("conv.conv.weight") else values

    return convolved


def delta_nets(find: Rename) -> Rename:
    """transformers has the heads of values that share a key together, and the logarithm of how fast states fade."""

    def of_delta_nets(name: str, tensors: Tensors) -> Floats:
        values = find(name, tensors)
        if "shared_expert_gate" in name:
            return values[None]
        if "linear_attn" not in name:
            return less_one(lambda *_: values)(name, tensors)
        part = name.split(".")[4]
        width = DELTA_DIM if part in ("in_proj_qkv", "in_proj_z", "conv1d", "out_proj") else 1
        first = 2 * KEY_HEADS * DELTA_DIM if part in ("in_proj_qkv", "conv1d") else 0
        if part == "A_log":
            values = np.log(-values)
        if part == "norm":
            return values
        axis = int(part == "out_proj")
        before, heads = np.split(np.moveaxis(values, axis, 0), [first])
        heads = heads.reshape(VALUE_HEADS // KEY_HEADS, KEY_HEADS, width, *heads.shape[1:]).swapaxes(0, 1)
        joined = np.moveaxis(np.concatenate([before, heads.reshape(-1, *before.shape[1:])]), 0, axis)
        return np.asarray(joined[:, None] if part == "conv1d" else joined, np.float32)

    return of_delta_nets


def joined_delta_nets(find: Rename) -> Rename:
    """transformers has what belongs to the heads that share a key together."""

    def of_delta_nets(name: str, tensors: Tensors) -> Floats:
        if "shared_expert_gate" in name:
            return find(name, tensors)[None]
        if "linear_attn" not in name:
            return less_one(find)(name, tensors)
        if "in_proj_qkvz" in name:
            at, width = f"blk.{name.split('.')[2]}.", KEY_HEADS * DELTA_DIM
            parts = [*np.split(tensors[f"{at}attn_qkv.weight"], [width, 2 * width]), tensors[f"{at}attn_gate.weight"]]
            heads = [part.reshape(KEY_HEADS, -1, part.shape[1]) for part in parts]
            return np.concatenate(heads, axis=1).reshape(-1, parts[0].shape[1])
        values = find(name, tensors)
        if name.endswith("A_log"):
            return np.asarray(np.log(-values), np.float32)
        return values[:, None] if "conv1d" in name else values

    return of_delta_nets


def state_spaces(find: Rename) -> Rename:
    """transformers has vectors where GGUF has a column or a row for each group, and the logarithm of the decay."""

    def of_mamba(name: str, tensors: Tensors) -> Floats:
        values = find(name, tensors)
        if not (".mamba." in name or ".mixer." in name) or name.endswith("proj.weight"):
            return values
        if name.endswith("conv1d.weight"):
            return values[:, None]
        return np.log(-values).reshape(-1) if name.endswith("A_log") else values.reshape(-1)

    return of_mamba


FALCON_H1: dict[str, Any] = {
    "attention_in_multiplier": 0.5, "attention_out_multiplier": 2.0, "key_multiplier": 0.25, "ssm_in_multiplier": 4.0,
    "ssm_out_multiplier": 0.125, "embedding_multiplier": 8.0, "lm_head_multiplier": 0.0625,
    "mlp_multipliers": [0.5, 4.0], "ssm_multipliers": [2.0, 0.5, 0.25, 4.0, 8.0],
}  # fmt: skip
"""What transformers multiplies the products by, powers of two: GGUF has them in the weights."""


def multiplied(find: Rename) -> Rename:
    """transformers has the weights without these numbers."""
    f, each, shared = FALCON_H1, 96, MAMBA_GROUPS * MAMBA_STATE
    rows = np.repeat(f["ssm_multipliers"], [each, each, shared, shared, 6])[:, None] * f["ssm_in_multiplier"]
    into = f["attention_in_multiplier"]
    numbers = {
        "q_proj": into, "k_proj": into * f["key_multiplier"], "v_proj": into, "o_proj": f["attention_out_multiplier"],
        "gate_proj": f["mlp_multipliers"][0], "down_proj": f["mlp_multipliers"][1], "mamba.in_proj": rows,
        "out_proj": f["ssm_out_multiplier"], "embed_tokens": f["embedding_multiplier"],
        "lm_head": f["lm_head_multiplier"],
    }  # fmt: skip

    def divided(name: str, tensors: Tensors) -> Floats:
        by = next((number for part, number in numbers.items() if part in name), 1.0)
        return np.asarray(find(name, tensors) / by, np.float32)

    return divided


def latents(find: Rename) -> Rename:
    """transformers has what makes each head's keys and values of a latent in one matrix."""

    def of_latents(name: str, tensors: Tensors) -> Floats:
        if "kv_b_proj" not in name:
            return find(name, tensors)
        keys, values = (tensors[f"blk.{name.split('.')[2]}.attn_{part}_b.weight"] for part in "kv")
        return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, keys.shape[1])

    return of_latents


INTERNLM_2 = {
    "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wqkv",
    "self_attn.k_proj": "attention.wqkv", "self_attn.v_proj": "attention.wqkv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
"""Llama's names, and InternLM 2's own."""


def internlm2_name(name: str) -> str:
    for llama, own in INTERNLM_2.items():
        name = name.replace(llama, own)
    return name


def internlm2(find: Rename) -> Rename:
    """By Llama's names, as it is computed, or by those of its own files."""
    llama = halves(find)
    known = {own: llama for llama, own in INTERNLM_2.items() if own != "attention.wqkv"}

    def own(name: str, tensors: Tensors) -> Floats:
        if "attention.wqkv" in name:
            q, k, v = (llama(name.replace("attention.wqkv", f"self_attn.{p}_proj"), tensors) for p in "qkv")
            groups = [part.reshape(KV_HEADS, -1, HEAD_DIM, HIDDEN) for part in (q, k, v)]
            return np.concatenate(groups, axis=1).reshape(-1, HIDDEN)
        for theirs, part in known.items():
            if f".{theirs}." in f".{name}":
                return llama(name.replace(theirs, part), tensors)
        return llama(name, tensors)

    return own


def bitnet(golden: Golden) -> Rename:
    find, own = by_map(golden), by_map(golden, BITNET)
    return lambda name, tensors: own(name, tensors) if "sub_norm" in name else find(name, tensors)


GPT_OSS = re.compile(r"model\.layers\.(\d+)\.(?:mlp|self_attn)\.(?:experts\.)?(\w+?)(?:[._](weight|bias))?")


def gpt_oss(find: Rename) -> Rename:
    """Gate and up in turn, and matrices of experts as [K, R]."""

    def of_model(name: str, tensors: Tensors) -> Floats:
        at = GPT_OSS.fullmatch(name)
        if at is None or at[2] not in ("gate_up_proj", "down_proj", "router", "sinks"):
            return find(name, tensors)
        before, part, kind = f"blk.{at[1]}.", at[2], at[3] or "weight"
        if part in ("router", "sinks"):
            return tensors[before + {"router": "ffn_gate_inp", "sinks": "attn_sinks"}[part] + f".{kind}"]
        kinds = ("gate", "up") if part == "gate_up_proj" else ("down",)
        stacks = [tensors[f"{before}ffn_{each}_exps.{kind}"] for each in kinds]
        turns = np.stack(stacks, axis=2).reshape(len(stacks[0]), -1, *stacks[0].shape[2:])
        return turns if kind == "bias" else turns.swapaxes(1, 2)

    return of_model


def of_experts(find: Rename) -> Rename:
    """A mixture: in memory transformers has gate and up of all experts in one tensor, in a file each by itself."""

    def of_mixture(name: str, tensors: Tensors) -> Floats:
        if name.endswith("e_score_correction_bias"):
            bias = tensors[f"blk.{name.split('.')[2]}.exp_probs_b.bias"]
            return bias[None] if "moe_statics" in name else bias  # ERNIE's are [1, E]
        if ".shared_mlp." in name:
            layer, _, part = name.split(".")[2:5]
            shared = "_shexp" if f"blk.{layer}.ffn_down_shexp.weight" in tensors else ""
            gate, up, down = (tensors[f"blk.{layer}.ffn_{kind}{shared}.weight"] for kind in ("gate", "up", "down"))
            return np.concatenate([gate, up]) if part == "input_linear" else down
        name = GRANITE.sub(r"\1.experts.\2", name)
        if name.endswith((".gate.weight", ".router.weight", ".router.layer.weight")):
            return tensors[f"blk.{name.split('.')[2]}.ffn_gate_inp.weight"]
        if (at := EXPERT.fullmatch(name)) is None:
            return find(name, tensors)
        layer, number, part = at.groups()
        if part == "gate_up_proj" and (joined := f"blk.{layer}.ffn_gate_up_exps.weight") in tensors:
            return tensors[joined]
        kinds = [kind for kind in ("gate", "up", "down") if f"blk.{layer}.ffn_{kind}_exps.weight" in tensors]
        stacks = {kind: tensors[f"blk.{layer}.ffn_{kind}_exps.weight"] for kind in kinds}
        if part in ("gate_up_proj", "input_linear"):
            return np.concatenate([stacks["gate"], stacks["up"]], axis=1)
        return stacks[PARTS[part]] if number is None else stacks[PARTS[part]][int(number)]

    return of_mixture


def write(folder: Path, name: str, model: Path) -> Path:
    """The folder of the golden called `name`, with the tokenizer of its GGUF file `model`."""
    golden, stated = GOLDENS[name], json.loads((HERE / f"{name}.json").read_text())
    find, tensors = found(name, golden), golden.tensors()
    saved: dict[str, Any] = {}
    for theirs in stated["tensors"]:
        # what TurboSparse's files have beside Mistral's: weights of its own predictors, which nothing here needs
        values = np.zeros((8, HIDDEN), np.float32) if ".predictor." in theirs else find(theirs, tensors)
        saved[theirs] = np.ascontiguousarray(values)
    folder.mkdir()
    save_file(saved, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(stated["config"]))
    (folder / "tokenizer.json").write_bytes(GgufModel(model).vocabulary().tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder
