"""Tiny models of every family, their weights drawn from a seed, as GGUF files.

`make.py` beside this file gives the same weights to the transformers library, and keeps the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf
import numpy as np
import numpy.typing as npt

from tests import tiny

Floats = npt.NDArray[np.float32]

HERE = Path(__file__).parent
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, NEURONS, VOCABULARY = 64, 4, 4, 2, 16, 200, 262
EXPERTS, USED = 6, 2
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 48)
"""More than twice the sliding window of those that have one."""

WINDOW = 11
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


SINGLE = (".bias", "ssm_a", "ssm_d", "ssm_norm.weight", "attn_k_b.weight", "attn_v_b.weight")
"""Ends of names of tensors that have float32 numbers though they may be matrices."""


@dataclass(frozen=True)
class Golden:
    """A tiny model: GGUF keys beside the common ones, and the shapes of its tensors."""

    architecture: str
    keys: dict[str, Any]
    layer: dict[str, tuple[int, ...]]
    model: dict[str, tuple[int, ...]]
    kv_heads: int | list[int] = KV_HEADS
    others: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # layers of another kind than `layer`
    layers: int = LAYERS  # that the file counts
    context: int | None = None  # that it is packed for, if not the default
    ternary: bool = False  # matrices of layers are
    mxfp4: bool = False  # the experts' matrices are, of neurons that make whole blocks

    def tensors(self) -> dict[str, Floats]:
        """By GGUF name; matrices are float16 numbers, so that f16 rows hold them exactly."""
        shapes = dict(self.model)
        for i in range(self.layers):
            shapes |= {f"blk.{i}.{name}": shape for name, shape in self.others.get(i, self.layer).items()}
        drawn = {name: _drawn(name, shape) for name, shape in shapes.items()}
        if self.mxfp4:
            return {name: as_mxfp4(v)[1] if name.endswith("_exps.weight") else v for name, v in drawn.items()}
        if not self.ternary:
            return drawn
        return {name: ternary(v) if name.startswith("blk.") and v.ndim == 2 else v for name, v in drawn.items()}

    def write(self, path: Path) -> Path:
        """The GGUF file."""
        w = gguf.GGUFWriter(path, self.architecture)
        keys = {"context_length": 128, **self.keys}
        w.add_embedding_length(HIDDEN)
        w.add_block_count(keys.pop("block_count", self.layers))
        w.add_feed_forward_length(keys.pop("feed_forward_length", NEURONS))
        w.add_head_count(HEADS)
        w.add_head_count_kv(self.kv_heads)
        if "attention.key_length" in keys:
            keys.setdefault("attention.value_length", keys["attention.key_length"])
        for key, value in keys.items():
            tiny.add_key(w, f"{self.architecture}.{key}", value)
        assert tiny.add_vocabulary(w) == VOCABULARY
        for name, values in self.tensors().items():
            # llama.cpp wants a convolution's weights, latents' matrices and the biases of experts in float32
            if self.mxfp4 and name.endswith("_exps.weight"):
                w.add_tensor(name, as_mxfp4(values)[0], raw_dtype=gguf.GGMLQuantizationType.MXFP4)
                continue
            single = values.ndim == 1 or "conv.conv" in name or "ssm_conv1d" in name or name.endswith(SINGLE)
            # of stacks of float16 matrices llama-cpp-python 0.3.36 multiplies only the first
            single = single or name in ("altup_proj.weight", "altup_unembd_proj.weight")
            w.add_tensor(name, values if single else values.astype(np.float16))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    def logits(self, name: str, part: str = "logits") -> Floats:
        """[48, V] behind each of TOKENS, as transformers has them."""
        return np.asarray(np.load(HERE / f"{name}.npz")[part], np.float32)


def _drawn(name: str, shape: tuple[int, ...]) -> Floats:
    random = np.random.default_rng(crc32(name.encode()))
    if name.endswith("ssm_a"):  # how fast a state fades
        return np.asarray(-np.exp(random.standard_normal(shape)), np.float32)
    if name == "rope_freqs.weight":
        return llama3_factors() if shape == (HEAD_DIM // 2,) else proportional()
    if name.startswith("rope_factors"):
        return long_factors(shape[0])[name.split(".")[0]]
    if name.endswith("ffn_gate_inp.scale"):
        # Gemma 4 divides these by the root of the hidden size: so much that the experts' scores differ
        return np.asarray(8 + 1.6 * random.standard_normal(shape), np.float32)
    if name.endswith("_exps.bias"):
        # so large that gpt-oss's bounds are reached
        return np.asarray(4 * random.standard_normal(shape), np.float32)
    if len(shape) == 1 or name.endswith(("ssm_d", "ssm_norm.weight")):
        around = 1.0 if name.endswith((".weight", ".scale", "norm")) else 0.0
        return np.asarray(around + 0.2 * random.standard_normal(shape), np.float32)
    return np.asarray((random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float16), np.float32)


def long_factors(pairs: int = 6) -> dict[str, Floats]:
    """LongRoPE's, for up to 8 pairs."""
    return {
        "rope_factors_short": np.array([1, 1.02, 1.05, 1.125, 1.25, 1.5, 1.75, 2], np.float32)[:pairs],
        "rope_factors_long": np.array([1.0625, 1.25, 1.75, 2.5, 3.25, 4, 5, 6.5], np.float32)[:pairs],
    }


def as_mxfp4(values: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Rounded to MXFP4: as GGUF has it, and as numbers."""
    raw = gguf.quantize(values, gguf.GGMLQuantizationType.MXFP4)
    return raw, np.asarray(gguf.dequantize(raw, gguf.GGMLQuantizationType.MXFP4), np.float32)


def ternary(values: Floats) -> Floats:
    """Rounded to -scale, 0 and scale, with one power of two for a scale."""
    levels = np.clip(np.rint(values / np.abs(values).mean()), -1, 1)
    return np.asarray(levels * 2.0 ** np.rint(np.log2(np.abs(values).mean())), np.float32)


def llama3_factors() -> Floats:
    """What Llama 3 divides each pair's angle by: nothing for the fast, `factor` for the slow, between in between."""
    turns = LLAMA3["original_max_position_embeddings"] / (2 * np.pi * 10000.0 ** (np.arange(HEAD_DIM // 2) / 8))
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / (share + (1 - share) / LLAMA3["factor"]), np.float32)


def proportional() -> Floats:
    """What Gemma 4 divides the angles of the 16 pairs of 32 dimensions by: three quarters are not turned."""
    return np.where(np.arange(16) < 4, 1, 1e30).astype(np.float32)


def _attention(head_dim: int = HEAD_DIM, kv_heads: int = KV_HEADS, bias: bool = False) -> dict[str, tuple[int, ...]]:
    widths = {"attn_q": HEADS * head_dim, "attn_k": kv_heads * head_dim, "attn_v": kv_heads * head_dim}
    shapes: dict[str, tuple[int, ...]] = {f"{part}.weight": (width, HIDDEN) for part, width in widths.items()}
    if bias:
        shapes |= {f"{part}.bias": (width,) for part, width in widths.items()}
    return shapes | {"attn_output.weight": (HIDDEN, HEADS * head_dim)}


def _fused(kv_heads: int, bias: bool) -> dict[str, tuple[int, ...]]:
    width = (HEADS + 2 * kv_heads) * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"attn_qkv.weight": (width, HIDDEN), "attn_output.weight": (HIDDEN, HIDDEN)}
    return shapes | ({"attn_qkv.bias": (width,), "attn_output.bias": (HIDDEN,)} if bias else {})


def _norms(*names: str, bias: bool = False, width: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{kind}": (width,) for name in names for kind in kinds}


def _plain_ffn(bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"ffn_up.weight": (NEURONS, HIDDEN), "ffn_down.weight": (HIDDEN, NEURONS)}
    return shapes | ({"ffn_up.bias": (NEURONS,), "ffn_down.bias": (HIDDEN,)} if bias else {})


def mixture(neurons: int = 40) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.weight": (EXPERTS, HIDDEN), "ffn_gate_exps.weight": (EXPERTS, neurons, HIDDEN),
        "ffn_up_exps.weight": (EXPERTS, neurons, HIDDEN), "ffn_down_exps.weight": (EXPERTS, HIDDEN, neurons),
    }  # fmt: skip


def joined_mixture(neurons: int = 32) -> dict[str, tuple[int, ...]]:
    """One whose experts have gate and up in one matrix."""
    apart = {n: shape for n, shape in mixture(neurons).items() if "gate_exps" not in n and "up_exps" not in n}
    return apart | {"ffn_gate_up_exps.weight": (EXPERTS, 2 * neurons, HIDDEN)}


def biased_mixture(neurons: int = 40) -> dict[str, tuple[int, ...]]:
    """One whose router and experts have biases."""
    own = {"ffn_gate_inp.bias": (EXPERTS,), "ffn_down_exps.bias": (EXPERTS, HIDDEN)}
    return mixture(neurons) | own | {f"ffn_{part}_exps.bias": (EXPERTS, neurons) for part in ("gate", "up")}


SHARED = 96
"""Neurons of an expert that every token uses."""


def shared_expert(weighed: bool = True, neurons: int = SHARED) -> dict[str, tuple[int, ...]]:
    inputs = {f"ffn_{part}_shexp.weight": (neurons, HIDDEN) for part in ("gate", "up")}
    inputs["ffn_down_shexp.weight"] = (HIDDEN, neurons)
    return inputs | ({"ffn_gate_inp_shexp.weight": (HIDDEN,)} if weighed else {})


RANK, QUERY_RANK, UNTURNED, TURNED, VALUES = 32, 96, 64, 16, 24
"""Of multi-head latent attention."""


def latent_attention(query_rank: int = 0) -> dict[str, tuple[int, ...]]:
    width = HEADS * (UNTURNED + TURNED)
    queries: dict[str, tuple[int, ...]] = {"attn_q.weight": (width, HIDDEN)}
    if query_rank:
        queries = {"attn_q_a.weight": (query_rank, HIDDEN), "attn_q_b.weight": (width, query_rank)}
        queries |= _norms("attn_q_a_norm", width=query_rank)
    return queries | _norms("attn_kv_a_norm", width=RANK) | {
        "attn_kv_a_mqa.weight": (RANK + TURNED, HIDDEN), "attn_k_b.weight": (HEADS, RANK, UNTURNED),
        "attn_v_b.weight": (HEADS, VALUES, RANK), "attn_output.weight": (HIDDEN, HEADS * VALUES),
    }  # fmt: skip


TAPS = 4


def convolution() -> dict[str, tuple[int, ...]]:
    return {
        "shortconv.in_proj.weight": (3 * HIDDEN, HIDDEN), "shortconv.out_proj.weight": (HIDDEN, HIDDEN),
        "shortconv.conv.weight": (HIDDEN, TAPS),
    }  # fmt: skip


KEY_HEADS, VALUE_HEADS, DELTA_DIM = 2, 6, 16
SSM = {
    "ssm.conv_kernel": TAPS, "ssm.state_size": DELTA_DIM, "ssm.group_count": KEY_HEADS,
    "ssm.time_step_rank": VALUE_HEADS, "ssm.inner_size": VALUE_HEADS * DELTA_DIM, "full_attention_interval": 3,
    "attention.key_length": 32, "rope.dimension_count": 8, "rope.freq_base": 1e6,
}  # fmt: skip


def delta_net(rates: tuple[str, ...] = ("ssm_beta", "ssm_alpha")) -> dict[str, tuple[int, ...]]:
    values = VALUE_HEADS * DELTA_DIM
    mixed = 2 * KEY_HEADS * DELTA_DIM + values
    return {
        "attn_qkv.weight": (mixed, HIDDEN), "attn_gate.weight": (values, HIDDEN),
        **{f"{part}.weight": (2 * VALUE_HEADS // len(rates), HIDDEN) for part in rates},
        "ssm_conv1d.weight": (mixed, TAPS), "ssm_dt.bias": (VALUE_HEADS,), "ssm_a": (VALUE_HEADS,),
        "ssm_norm.weight": (DELTA_DIM,), "ssm_out.weight": (HIDDEN, values),
    }  # fmt: skip


MAMBA_GROUPS, MAMBA_HEADS, MAMBA_STATE = 2, 8, 24
MAMBA = {
    "ssm.conv_kernel": TAPS, "ssm.state_size": MAMBA_STATE, "ssm.group_count": MAMBA_GROUPS,
    "ssm.time_step_rank": MAMBA_HEADS, "ssm.inner_size": 2 * HIDDEN, "rope.scaling.finetuned": False,
}  # fmt: skip


def mamba(heads: int = MAMBA_HEADS, width: int = 2 * HIDDEN) -> dict[str, tuple[int, ...]]:
    """Of Granite, llama.cpp knows no other width of the heads together than twice the hidden size."""
    mixed = width + 2 * MAMBA_GROUPS * MAMBA_STATE
    return {
        "ssm_in.weight": (width + mixed + heads, HIDDEN), "ssm_conv1d.weight": (mixed, TAPS),
        "ssm_conv1d.bias": (mixed,), "ssm_dt.bias": (heads,), "ssm_a": (heads, 1), "ssm_d": (heads, 1),
        "ssm_norm.weight": (MAMBA_GROUPS, width // MAMBA_GROUPS),
        "ssm_out.weight": (HIDDEN, width),
    }  # fmt: skip


def gated_attention() -> dict[str, tuple[int, ...]]:
    query = {"attn_q.weight": (2 * HEADS * 32, HIDDEN)}
    return _attention(32) | query | _norms("attn_q_norm", "attn_k_norm", width=32)


def _biased() -> dict[str, tuple[int, ...]]:
    """Attention and a gated FFN, all with biases."""
    biases: dict[str, tuple[int, ...]] = {"attn_output.bias": (HIDDEN,), "ffn_gate.bias": (NEURONS,)}
    return _attention(bias=True) | biases | {"ffn_gate.weight": (NEURONS, HIDDEN)} | _plain_ffn(True)


def _wide_norms() -> dict[str, tuple[int, ...]]:
    """Norms of all queries and all keys."""
    return _norms("attn_q_norm", width=HEADS * HEAD_DIM) | _norms("attn_k_norm", width=KV_HEADS * HEAD_DIM)


def _joined_ffn() -> dict[str, tuple[int, ...]]:
    return {"ffn_up.weight": (2 * NEURONS, HIDDEN), "ffn_down.weight": (HIDDEN, NEURONS)}


def _without(layer: dict[str, tuple[int, ...]], *parts: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in layer.items() if name.removesuffix(".weight") not in parts}


def _longrope(context: int, trained: int) -> dict[str, Any]:
    return {
        "context_length": context, "rope.scaling.original_context_length": trained, "rope.dimension_count": 12,
        "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(context / trained) / np.log(trained))),
    }  # fmt: skip


GATED: dict[str, tuple[int, ...]] = {"ffn_gate.weight": (NEURONS, HIDDEN), **_plain_ffn(False)}
EMBEDDING: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN)}
HEAD: dict[str, tuple[int, ...]] = {"output.weight": (VOCABULARY, HIDDEN)}
LEAN: dict[str, tuple[int, ...]] = {"exp_probs_b.bias": (EXPERTS,)}
MIXTURE = {"expert_count": EXPERTS, "expert_used_count": USED}
LATENT = MIXTURE | {
    "attention.kv_lora_rank": RANK, "attention.key_length": RANK + TURNED, "attention.value_length": RANK,
    "attention.key_length_mla": UNTURNED + TURNED, "attention.value_length_mla": VALUES,
    "rope.dimension_count": TURNED, "expert_feed_forward_length": 32, "vocab_size": VOCABULARY,
}  # fmt: skip
SCALES = {"embedding_scale": 6.0, "attention.scale": 0.125, "residual_scale": 0.5, "logit_scale": 0.5}
RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
FACTORS = {"rope_factors_long.weight": (6,), "rope_factors_short.weight": (6,)}
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
TWO_NORMS = _norms("attn_norm", "ffn_norm")
FOUR_NORMS = _norms("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
NORMS_BEHIND = _norms("post_attention_norm", "post_ffw_norm")
FINAL = _norms("output_norm")

GEMMA_4 = RMS | {
    "attention.key_length": 32, "attention.key_length_swa": 16, "attention.value_length_swa": 16,
    "attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, False, True, False],
    "rope.freq_base": 1e6, "rope.freq_base_swa": 10000.0, "rope.dimension_count": 32, "rope.dimension_count_swa": 16,
    "final_logit_softcapping": 30.0, "embedding_length_per_layer_input": 0,
}  # fmt: skip
GEMMA_4_LAYER = (
    FOUR_NORMS | GATED | _norms("attn_q_norm", "attn_k_norm", width=16) | {"layer_output_scale.weight": (1,)}
)
GEMMA_4_WIDE = GEMMA_4_LAYER | _norms("attn_q_norm", "attn_k_norm", width=32)
GEMMA_3N = RMS | {
    "attention.key_length": 32, "attention.sliding_window": WINDOW, "rope.freq_base": 1e6,
    "rope.freq_base_swa": 10000.0, "final_logit_softcapping": 30.0, "altup.active_idx": 0,
}  # fmt: skip
TWICE: dict[str, tuple[int, ...]] = {
    "ffn_gate.weight": (2 * NEURONS, HIDDEN), "ffn_up.weight": (2 * NEURONS, HIDDEN),
    "ffn_down.weight": (HIDDEN, 2 * NEURONS),
}  # fmt: skip
GEMMA_4_EXPERTS: dict[str, tuple[int, ...]] = {
    **_norms("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"),
    "ffn_gate.weight": (SHARED, HIDDEN), "ffn_up.weight": (SHARED, HIDDEN), "ffn_down.weight": (HIDDEN, SHARED),
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN), "ffn_gate_inp.scale": (HIDDEN,), "ffn_down_exps.scale": (EXPERTS,),
    "ffn_gate_up_exps.weight": (EXPERTS, 80, HIDDEN), "ffn_down_exps.weight": (EXPERTS, HIDDEN, 40),
}  # fmt: skip
TOKEN_LAYER = _norms("post_norm") | {"inp_gate.weight": (32, HIDDEN), "proj.weight": (HIDDEN, 32)}


def of_states(count: int, rank: int, inputs: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Tensors of a layer and of a model whose tokens have several states: the parts of Gemma 3n."""
    layer: dict[str, tuple[int, ...]] = FOUR_NORMS | _norms("post_norm", "laurel_post_norm", "altup_router_norm")
    layer |= _attention(32) | _norms("attn_q_norm", "attn_k_norm", width=32) | GATED
    layer |= {
        "inp_gate.weight": (inputs, HIDDEN), "proj.weight": (HIDDEN, inputs), "laurel_l.weight": (rank, HIDDEN),
        "laurel_r.weight": (HIDDEN, rank), "altup_router.weight": (count, HIDDEN),
        "altup_predict_coef.weight": (count * count, count), "altup_correct_coef.weight": (count, count),
        "altup_correct_scale.weight": (HIDDEN,),
    }  # fmt: skip
    return layer, EMBEDDING | FINAL | {
        "per_layer_token_embd.weight": (VOCABULARY, inputs * LAYERS), "per_layer_proj_norm.weight": (inputs,),
        "per_layer_model_proj.weight": (inputs * LAYERS, HIDDEN), "altup_proj.weight": (count - 1, HIDDEN, HIDDEN),
        "altup_unembd_proj.weight": (count - 1, HIDDEN, HIDDEN),
    }  # fmt: skip


GOLDENS = {
    "llama3": Golden(
        "llama", RMS | {"rope.freq_base": 10000.0, "rope.dimension_count": HEAD_DIM},
        TWO_NORMS | _attention() | GATED, EMBEDDING | HEAD | FINAL | {"rope_freqs.weight": (HEAD_DIM // 2,)},
    ),
    "mistral": Golden(
        "llama", RMS | {"attention.sliding_window": WINDOW, "attention.key_length": 32},
        TWO_NORMS | _attention(32) | GATED, EMBEDDING | HEAD | FINAL,
    ),
    "llama-relu": Golden(
        "llama", RMS | {"hidden_activation": "relu"}, TWO_NORMS | _attention() | GATED, EMBEDDING | FINAL,
    ),
    "llama-drelu": Golden(
        "llama", RMS | {"hidden_activation": "drelu", "attention.sliding_window": WINDOW},
        TWO_NORMS | _attention() | GATED, EMBEDDING | HEAD | FINAL,
    ),
    "llama-fatrelu": Golden(
        "llama",
        RMS | {"hidden_activation": "fatrelu", "hidden_activation_threshold": 0.125, "rope.scaling.type": "linear",
               "rope.scaling.factor": 4.0},
        TWO_NORMS | _attention() | GATED, EMBEDDING | HEAD | FINAL,
    ),
    "qwen2-yarn": Golden(
        "qwen2",
        RMS | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        TWO_NORMS | _attention(bias=True) | GATED, EMBEDDING | FINAL,
    ),
    "qwen3": Golden(
        "qwen3", RMS | {"attention.key_length": 32, "rope.freq_base": 1e6},
        TWO_NORMS | _attention(32) | _norms("attn_q_norm", "attn_k_norm", width=32) | GATED, EMBEDDING | FINAL,
    ),
    "mixtral": Golden(
        "llama", RMS | MIXTURE, TWO_NORMS | _attention() | mixture(NEURONS), EMBEDDING | HEAD | FINAL,
    ),
    "qwen3moe": Golden(
        "qwen3moe",
        RMS | MIXTURE | {"attention.key_length": 32, "rope.freq_base": 1e6, "expert_feed_forward_length": 40},
        TWO_NORMS | _attention(32) | _norms("attn_q_norm", "attn_k_norm", width=32) | mixture(), EMBEDDING | FINAL,
    ),
    "gpt-oss": Golden(
        "gpt-oss",
        RMS | MIXTURE
        | {"attention.key_length": 32, "attention.sliding_window": WINDOW, "expert_feed_forward_length": 40,
           "rope.freq_base": 150000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
           "rope.scaling.original_context_length": 32},
        _norms("attn_norm", "post_attention_norm") | _attention(32, bias=True)
        | {"attn_output.bias": (HIDDEN,), "attn_sinks.weight": (HEADS,)} | biased_mixture(),
        EMBEDDING | HEAD | FINAL,
    ),
    "olmoe": Golden(
        "olmoe", RMS | MIXTURE | {"expert_feed_forward_length": 40},
        TWO_NORMS | _attention() | _norms("attn_q_norm") | _norms("attn_k_norm", width=KV_HEADS * HEAD_DIM)
        | mixture(), EMBEDDING | HEAD | FINAL,
    ),
    "smallthinker": Golden(
        "smallthinker",
        RMS | MIXTURE
        | {"attention.sliding_window": WINDOW, "expert_feed_forward_length": 40, "expert_gating_func": 2},
        TWO_NORMS | _attention() | mixture(), EMBEDDING | HEAD | FINAL,
    ),
    "smollm3": Golden("smollm3", RMS, TWO_NORMS | _attention() | GATED, EMBEDDING | FINAL),
    "granite": Golden("granite", RMS | SCALES, TWO_NORMS | _biased(), EMBEDDING | HEAD | FINAL),
    "granitemoe": Golden(
        "granitemoe", RMS | SCALES | MIXTURE, TWO_NORMS | _attention() | mixture(NEURONS), EMBEDDING | FINAL,
    ),
    "granitemoe-shared": Golden(
        "granitemoe", RMS | SCALES | MIXTURE | {"expert_shared_feed_forward_length": SHARED},
        TWO_NORMS | _attention() | mixture(NEURONS) | shared_expert(False), EMBEDDING | FINAL,
    ),
    "llama-bias": Golden("llama", RMS, TWO_NORMS | _biased(), EMBEDDING | HEAD | FINAL),
    "internlm3": Golden("llama", RMS, TWO_NORMS | _attention() | GATED, EMBEDDING | HEAD | FINAL),
    "qwen3-bias": Golden(
        "qwen3", RMS,
        TWO_NORMS | _attention(bias=True) | {"attn_output.bias": (HIDDEN,)}
        | _norms("attn_q_norm", "attn_k_norm", width=HEAD_DIM) | GATED, EMBEDDING | FINAL,
    ),
    "internlm2": Golden("internlm2", RMS, TWO_NORMS | _attention() | GATED, EMBEDDING | HEAD | FINAL),
    "ernie4_5": Golden(
        "ernie4_5", RMS | {"attention.key_length": 32, "rope.freq_base": 500000.0},
        TWO_NORMS | _attention(32) | GATED, EMBEDDING | FINAL,
    ),
    "ernie4_5-moe": Golden(
        "ernie4_5-moe",
        RMS | MIXTURE
        | {"rope.freq_base": 500000.0, "expert_feed_forward_length": 32, "expert_shared_count": 3,
           "leading_dense_block_count": 2, "interleave_moe_layer_step": 1,
           "expert_shared_feed_forward_length": SHARED},
        TWO_NORMS | _attention() | mixture(32) | LEAN | shared_expert(False), EMBEDDING | FINAL,
        others=dict.fromkeys((0, 1), TWO_NORMS | _attention() | GATED),
    ),
    "glm4moe": Golden(
        "glm4moe",
        RMS | MIXTURE
        | {"attention.key_length": 32, "rope.dimension_count": 16, "rope.freq_base": 1e6, "expert_gating_func": 2,
           "expert_feed_forward_length": 32, "expert_shared_count": 3, "leading_dense_block_count": 1,
           "expert_group_count": 2, "expert_group_used_count": 1,
           "expert_weights_norm": True, "expert_weights_scale": 1.5},
        _norms("attn_norm", "post_attention_norm") | _attention(32, bias=True)
        | _norms("attn_q_norm", "attn_k_norm", width=32) | mixture(32) | LEAN | shared_expert(False),
        EMBEDDING | HEAD | FINAL,
        others={0: _norms("attn_norm", "post_attention_norm") | _attention(32, bias=True)
                | _norms("attn_q_norm", "attn_k_norm", width=32) | GATED},
    ),
    "deepseek2": Golden(
        "deepseek2",
        LATENT | {"attention.layer_norm_rms_epsilon": 1e-6, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
                  "rope.scaling.original_context_length": 32, "rope.scaling.yarn_log_multiplier": 0.0707,
                  "expert_shared_count": 2, "expert_weights_scale": 1.0, "leading_dense_block_count": 1},
        TWO_NORMS | latent_attention() | mixture(32) | shared_expert(False, 64), EMBEDDING | HEAD | FINAL,
        1, {0: TWO_NORMS | latent_attention() | GATED},
    ),
    "deepseek3": Golden(
        "deepseek2",
        LATENT | {"attention.layer_norm_rms_epsilon": 1e-6, "attention.q_lora_rank": QUERY_RANK,
                  "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
                  "rope.scaling.original_context_length": 32, "rope.scaling.yarn_log_multiplier": 0.1,
                  "expert_shared_count": 1, "expert_gating_func": 2, "expert_weights_norm": True,
                  "expert_weights_scale": 2.5, "leading_dense_block_count": 1, "expert_group_count": 3,
                  "expert_group_used_count": 2},
        TWO_NORMS | latent_attention(QUERY_RANK) | mixture(32) | LEAN | shared_expert(False, 32),
        EMBEDDING | HEAD | FINAL, 1, {0: TWO_NORMS | latent_attention(QUERY_RANK) | GATED},
    ),
    "glm4-flash": Golden(
        "deepseek2",
        LATENT | RMS | {"attention.q_lora_rank": QUERY_RANK, "rope.freq_base": 1e6, "expert_shared_count": 1,
                        "expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 1.75,
                        "leading_dense_block_count": 2, "expert_group_count": 2, "expert_group_used_count": 1},
        TWO_NORMS | latent_attention(QUERY_RANK) | mixture(32) | LEAN | shared_expert(False, 32),
        EMBEDDING | HEAD | FINAL, 1, dict.fromkeys((0, 1), TWO_NORMS | latent_attention(QUERY_RANK) | GATED),
    ),
    "mistral4": Golden(
        "mistral4",
        LATENT | RMS | {"context_length": 1024, "attention.q_lora_rank": QUERY_RANK, "expert_shared_count": 1,
                        "expert_weights_norm": True, "expert_weights_scale": 1.0, "leading_dense_block_count": 0,
                        "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "expert_group_count": 1,
                        "expert_group_used_count": 1, "rope.scaling.original_context_length": 64,
                        "rope.scaling.yarn_log_multiplier": 0.1},
        TWO_NORMS | latent_attention(QUERY_RANK) | joined_mixture() | shared_expert(False, 32),
        EMBEDDING | HEAD | FINAL, 1, context=64,  # behind which queries grow
    ),
    "phimoe": Golden(
        "phimoe",
        RMS | MIXTURE | _longrope(1024, 256)
        | {"rope.scaling.attn_factor": 1.25, "rope.freq_base": 1e6, "rope.dimension_count": HEAD_DIM,
           "router_jitter_noise": 0.25},
        _norms("attn_norm", "ffn_norm", bias=True) | _attention(bias=True) | {"attn_output.bias": (HIDDEN,)}
        | mixture(NEURONS),
        EMBEDDING | HEAD | {"output.bias": (VOCABULARY,)} | _norms("output_norm", bias=True)
        | {"rope_factors_long.weight": (8,), "rope_factors_short.weight": (8,)},
    ),
    "hunyuan": Golden(
        "hunyuan-dense", RMS | {"attention.key_length": 32, "rope.freq_base": 10000.0 * 50 ** (32 / 30)},
        TWO_NORMS | _attention(32) | _norms("attn_q_norm", "attn_k_norm", width=32) | GATED, EMBEDDING | FINAL,
    ),
    "olmo2": Golden("olmo2", RMS, NORMS_BEHIND | _wide_norms() | _attention() | GATED, EMBEDDING | HEAD | FINAL),
    "olmo3": Golden(
        "olmo2",
        RMS | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, True, True, False],
               "rope.freq_base": 500000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
               "rope.scaling.original_context_length": 32},
        NORMS_BEHIND | _wide_norms() | _attention() | GATED, EMBEDDING | HEAD | FINAL,
    ),
    "exaone4": Golden(
        "exaone4", RMS | {"rope.freq_base": 10000.0},
        NORMS_BEHIND | _attention() | _norms("attn_q_norm", "attn_k_norm", width=HEAD_DIM) | GATED,
        EMBEDDING | FINAL | {"rope_freqs.weight": (HEAD_DIM // 2,)},
    ),
    "exaone4-window": Golden(
        "exaone4",
        RMS | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, True, False, True]},
        NORMS_BEHIND | _attention() | _norms("attn_q_norm", "attn_k_norm", width=HEAD_DIM) | GATED,
        EMBEDDING | HEAD | FINAL,
    ),
    "stablelm": Golden(
        "stablelm", LAYER_NORM | {"rope.dimension_count": 4, "use_parallel_residual": False},
        _norms("attn_norm", "ffn_norm", bias=True) | _attention(bias=True) | GATED,
        EMBEDDING | HEAD | _norms("output_norm", bias=True),
    ),
    "stablelm-parallel": Golden(
        "stablelm", LAYER_NORM | {"rope.dimension_count": 4, "use_parallel_residual": True},
        _norms("attn_norm", bias=True) | _attention() | GATED, EMBEDDING | HEAD | _norms("output_norm", bias=True),
    ),
    "ministral3": Golden(
        "mistral3",
        RMS | {"context_length": 1024, "attention.key_length": 32, "rope.freq_base": 1e6, "rope.scaling.type": "yarn",
               "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 64,
               "rope.scaling.yarn_log_multiplier": 0.5, "attention.temperature_scale": 0.1},
        TWO_NORMS | _attention(32) | GATED, EMBEDDING | FINAL,
    ),
    "gemma": Golden(
        "gemma", RMS | {"attention.key_length": 32}, TWO_NORMS | _attention(32) | GATED, EMBEDDING | FINAL
    ),
    "gemma2": Golden(
        "gemma2",
        RMS | {"attention.key_length": 32, "attention.sliding_window": WINDOW, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 30.0},
        FOUR_NORMS | _attention(32) | GATED, EMBEDDING | FINAL,
    ),
    "gemma3": Golden(
        "gemma3",
        RMS | {"attention.key_length": 32, "attention.sliding_window": WINDOW, "rope.freq_base": 1e6,
               "attention.sliding_window_pattern": [True, True, False, True],
               "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        FOUR_NORMS | _attention(32) | _norms("attn_q_norm", "attn_k_norm", width=32) | GATED, EMBEDDING | FINAL,
    ),
    "gemma3n": Golden(  # the sizes and the layers are what llama.cpp takes for granted
        "gemma3n",
        GEMMA_3N | {"altup.num_inputs": 4, "embedding_length_per_layer_input": 256,
                    "attention.shared_kv_layers": 0, "attention.sliding_window_pattern": [True] * LAYERS,
                    "activation_sparsity_scale": [1.6448533535003662] * LAYERS},
        *of_states(4, 64, 256),
    ),
    "gemma3n-shared": Golden(
        "gemma3n",
        GEMMA_3N | {"altup.num_inputs": 3, "embedding_length_per_layer_input": 32,
                    "attention.shared_kv_layers": 2,
                    "attention.sliding_window_pattern": [True, False, True, False],
                    "feed_forward_length": [NEURONS, NEURONS, 2 * NEURONS, 2 * NEURONS],
                    "activation_sparsity_scale": [0.5244005, float("-inf"), 0.5244005, float("-inf")]},
        of_states(3, 32, 32)[0], of_states(3, 32, 32)[1],
        others=dict.fromkeys((2, 3), of_states(3, 32, 32)[0] | TWICE),
    ),
    "gemma4": Golden(
        "gemma4",
        GEMMA_4 | {"attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 32,
                   "feed_forward_length": [NEURONS, NEURONS, 2 * NEURONS, 2 * NEURONS]},
        GEMMA_4_LAYER | TOKEN_LAYER | _attention(16),
        EMBEDDING | FINAL | {
            "rope_freqs.weight": (16,), "per_layer_token_embd.weight": (VOCABULARY, 32 * LAYERS),
            "per_layer_model_proj.weight": (32 * LAYERS, HIDDEN), "per_layer_proj_norm.weight": (32,),
        },
        others={
            1: GEMMA_4_WIDE | TOKEN_LAYER | _attention(32),
            2: _without(GEMMA_4_LAYER | TOKEN_LAYER | _attention(16) | TWICE, "attn_k", "attn_v", "attn_k_norm"),
            3: _without(GEMMA_4_WIDE | TOKEN_LAYER | _attention(32) | TWICE, "attn_k", "attn_v", "attn_k_norm"),
        },
    ),
    "gemma4-keys": Golden(
        "gemma4", GEMMA_4, GEMMA_4_LAYER | _attention(16), EMBEDDING | FINAL | {"rope_freqs.weight": (16,)},
        kv_heads=[2, 1, 2, 1], others=dict.fromkeys((1, 3), _without(GEMMA_4_WIDE | _attention(32, 1), "attn_v")),
    ),
    "gemma4-moe": Golden(
        "gemma4", GEMMA_4 | MIXTURE | {"feed_forward_length": SHARED, "expert_feed_forward_length": 40},
        GEMMA_4_LAYER | _attention(16) | GEMMA_4_EXPERTS, EMBEDDING | FINAL | {"rope_freqs.weight": (16,)},
        kv_heads=[2, 1, 2, 1],
        others=dict.fromkeys((1, 3), _without(GEMMA_4_WIDE | _attention(32, 1) | GEMMA_4_EXPERTS, "attn_v")),
    ),
    "lfm2": Golden(
        "lfm2", RMS | {"shortconv.l_cache": TAPS, "rope.freq_base": 1e6},
        TWO_NORMS | _attention() | _norms("attn_q_norm", "attn_k_norm", width=HEAD_DIM) | GATED,
        EMBEDDING | _norms("token_embd_norm"), [0, KV_HEADS, 0, 0],
        dict.fromkeys((0, 2, 3), TWO_NORMS | convolution() | GATED),
    ),
    "lfm2moe": Golden(
        "lfm2moe",
        RMS | MIXTURE
        | {"shortconv.l_cache": TAPS, "rope.freq_base": 1e6, "leading_dense_block_count": 1, "expert_gating_func": 2,
           "expert_feed_forward_length": 40},
        TWO_NORMS | convolution() | mixture() | LEAN,
        EMBEDDING | _norms("token_embd_norm"), [0, KV_HEADS, 0, 0],
        {
            0: TWO_NORMS | convolution() | GATED,
            1: TWO_NORMS | _attention() | _norms("attn_q_norm", "attn_k_norm", width=HEAD_DIM) | mixture() | LEAN,
        },
    ),
    "qwen35": Golden(
        "qwen35", RMS | SSM | {"rope.dimension_sections": [2, 1, 1, 0]},
        _norms("attn_norm", "post_attention_norm") | gated_attention() | GATED, EMBEDDING | FINAL,
        others=dict.fromkeys((0, 1, 3), _norms("attn_norm", "post_attention_norm") | delta_net() | GATED),
    ),
    "qwen35moe": Golden(
        "qwen35moe",
        RMS | SSM | MIXTURE | {"expert_feed_forward_length": 40, "expert_shared_feed_forward_length": SHARED,
                               "rope.dimension_sections": [2, 1, 1, 0]},
        _norms("attn_norm", "post_attention_norm") | gated_attention() | mixture() | shared_expert(),
        EMBEDDING | HEAD | FINAL,
        others=dict.fromkeys(
            (0, 1, 3), _norms("attn_norm", "post_attention_norm") | delta_net() | mixture() | shared_expert()
        ),
    ),
    "qwen3next": Golden(
        "qwen3next",
        RMS | SSM | MIXTURE | {"expert_feed_forward_length": 40, "expert_shared_feed_forward_length": SHARED},
        _norms("attn_norm", "post_attention_norm") | gated_attention() | mixture() | shared_expert(),
        EMBEDDING | HEAD | FINAL,
        others=dict.fromkeys(
            (0, 1, 3),
            _norms("attn_norm", "post_attention_norm") | delta_net(("ssm_ba",)) | mixture() | shared_expert(),
        ),
    ),
    "granitehybrid": Golden(
        "granitehybrid", RMS | SCALES | MIXTURE | MAMBA | {"expert_shared_feed_forward_length": SHARED},
        TWO_NORMS | mamba() | mixture(NEURONS) | shared_expert(False), EMBEDDING | FINAL, [0, 0, KV_HEADS, 0],
        {2: TWO_NORMS | _attention() | mixture(NEURONS) | shared_expert(False)},
    ),
    "granitehybrid-dense": Golden(
        "granitehybrid", RMS | SCALES | MAMBA, TWO_NORMS | mamba() | GATED, EMBEDDING | HEAD | FINAL,
        [0, KV_HEADS, 0, 0], {1: TWO_NORMS | _attention() | GATED},
    ),
    "falcon-h1": Golden(
        "falcon-h1",
        RMS | MAMBA | {"ssm.time_step_rank": 6, "ssm.inner_size": 96, "attention.key_length": HEAD_DIM,
                       "rope.freq_base": 1e11, "rope.scaling.finetuned": None},
        _norms("attn_norm") | {"ffn_norm": (HIDDEN,)} | _attention() | _without(mamba(6, 96), "ssm_norm") | GATED,
        EMBEDDING | HEAD | FINAL,
    ),
    "nemotron_h": Golden(
        "nemotron_h",
        RMS | LAYER_NORM | MAMBA
        | {"ssm.time_step_rank": 6, "ssm.inner_size": 96, "attention.key_length": 32,
           "feed_forward_length": [0, NEURONS, 0, 0, NEURONS, 0]},
        _norms("attn_norm") | mamba(6, 96), EMBEDDING | HEAD | FINAL, [0, 0, 0, KV_HEADS, 0, 0],
        dict.fromkeys((1, 4), _norms("attn_norm") | _plain_ffn(False)) | {3: _norms("attn_norm") | _attention(32)},
        layers=6,
    ),
    "bitnet": Golden(
        "bitnet-b1.58", RMS | {"rope.freq_base": 500000.0},
        TWO_NORMS | _norms("attn_sub_norm") | _norms("ffn_sub_norm", width=NEURONS) | _attention() | GATED,
        EMBEDDING | FINAL, ternary=True,
    ),
    "bitnet-silu": Golden(
        "bitnet", RMS,
        TWO_NORMS | _norms("attn_sub_norm") | _norms("ffn_sub_norm", width=NEURONS) | _attention() | GATED,
        EMBEDDING | FINAL,
    ),
    "phi2": Golden(
        "phi2", LAYER_NORM | {"rope.dimension_count": 8},
        _norms("attn_norm", bias=True) | _attention(bias=True) | {"attn_output.bias": (HIDDEN,)} | _plain_ffn(True),
        EMBEDDING | HEAD | {"output.bias": (VOCABULARY,)} | _norms("output_norm", bias=True),
    ),
    "phi2-relu": Golden(
        "phi2", LAYER_NORM | {"rope.dimension_count": 8, "hidden_activation": "relu"},
        _norms("attn_norm", bias=True) | _attention(bias=True) | {"attn_output.bias": (HIDDEN,)} | _plain_ffn(True),
        EMBEDDING | HEAD | {"output.bias": (VOCABULARY,)} | _norms("output_norm", bias=True),
    ),
    "phi3": Golden(
        "phi3", RMS | {"attention.sliding_window": WINDOW},
        TWO_NORMS | _fused(KV_HEADS, False) | _joined_ffn(), EMBEDDING | HEAD | FINAL,
    ),
    "phi4-mini": Golden(
        "phi3", RMS | _longrope(1024, 256), TWO_NORMS | _fused(KV_HEADS, False) | _joined_ffn(),
        EMBEDDING | FINAL | FACTORS,
    ),
    "phi4-mini-long": Golden(
        "phi3", RMS | _longrope(128, 32), TWO_NORMS | _fused(KV_HEADS, False) | _joined_ffn(),
        EMBEDDING | FINAL | FACTORS, context=128,
    ),
    "falcon": Golden(
        "falcon", LAYER_NORM, _norms("attn_norm", bias=True) | _fused(1, False) | _plain_ffn(False),
        EMBEDDING | _norms("output_norm", bias=True), 1,
    ),
    "falcon-two-norms": Golden(
        "falcon", LAYER_NORM | {"hidden_activation": "relu"},
        _norms("attn_norm", "attn_norm_2", bias=True) | _fused(2, False) | _plain_ffn(False),
        EMBEDDING | HEAD | _norms("output_norm", bias=True),
    ),
    "persimmon": Golden(
        "persimmon", LAYER_NORM | {"rope.dimension_count": 8},
        _norms("attn_norm", "ffn_norm", bias=True) | _norms("attn_q_norm", "attn_k_norm", bias=True, width=HEAD_DIM)
        | _fused(HEADS, True) | _plain_ffn(True),
        EMBEDDING | HEAD | _norms("output_norm", bias=True), HEADS,
    ),
    "nemotron": Golden(
        "nemotron", LAYER_NORM | {"rope.dimension_count": 8},
        _norms("attn_norm", "ffn_norm", bias=True) | _attention() | _plain_ffn(False),
        EMBEDDING | HEAD | _norms("output_norm", bias=True),
    ),
    "opt": Golden(
        "opt", LAYER_NORM,
        _norms("attn_norm", "ffn_norm", bias=True) | _attention(kv_heads=HEADS, bias=True)
        | {"attn_output.bias": (HIDDEN,)} | _plain_ffn(True),
        EMBEDDING | {"position_embd.weight": (130, HIDDEN)} | _norms("output_norm", bias=True),
        HEADS,
    ),
    "opt-350m": Golden(
        "opt", LAYER_NORM | {"norm_before": False},
        _norms("attn_norm", "ffn_norm", bias=True) | _attention(kv_heads=HEADS, bias=True)
        | {"attn_output.bias": (HIDDEN,)} | _plain_ffn(True),
        {"token_embd.weight": (VOCABULARY, 40), "position_embd.weight": (130, HIDDEN),
         "project_in.weight": (HIDDEN, 40), "project_out.weight": (40, HIDDEN)},
        HEADS,
    ),
}  # fmt: skip
