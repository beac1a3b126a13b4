"""One table an architecture: what is special about it, in the properties of bundle.layout.Model.

Names of tensors and keys are GGUF's. What a file may or may not have (biases, norms of queries and keys, one
tensor for queries, keys and values) is read from the file; the table says what the family allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from flashd.bundle.architecture import (
    LAYER_NORMS,
    Activation,
    Architecture,
    AttentionKind,
    Bias,
    Block,
    Experts,
    Norm,
    Place,
    Scores,
)
from flashd.bundle.row_kinds import BLOCK
from flashd.errors import DataError
from flashd.pack.groups import group_neurons
from flashd.pack.sources.source import Source


@dataclass(frozen=True)
class Mixture:
    """How a family's router weighs the experts that a token uses, where the file does not say."""

    normalised: bool = True
    early: bool = False


@dataclass(frozen=True)
class Family:
    """What differs from one architecture to the next; the defaults are Llama's."""

    architecture: str
    models: str  # what people call them
    checked: str  # the weights on which answers were compared with a reference; tiny: random ones, of tests/goldens
    block: Block = "sequential"
    norm: Norm = "rms"
    norms: tuple[Place, ...] = ("attention", "ffn", "final")
    biases: tuple[Bias, ...] = ()
    may_have: tuple[Place | Bias, ...] = ()  # norms and biases that some models of the family have
    gated: bool = True
    activation: Activation = "silu"
    permuted: bool = False  # GGUF keeps llama's q and k rows in rotary pairs (2i, 2i + 1) and others' in halves
    rotary: bool = True
    unturned_every: int = 0  # each so manyth layer does not turn queries and keys
    global_every: int = 0  # each so manyth layer sees all tokens, the others a window
    global_first: bool = False  # and of each so many it is the first
    global_unturned: bool = False  # where others see a window, those that see all tokens do not turn queries and keys
    local_base: float = 0.0  # the rotary base of layers that see a window, where it is another one
    scaled_embeddings: bool = False  # by the root of the hidden size
    scale_by_width: tuple[int, ...] = ()  # models of so many layers scale queries by hidden size / heads
    norms_neurons: bool = False  # activations are normed before the down product
    mixture: Mixture | None = None  # of experts, where the file counts some
    position_offset: int = 0  # rows of the table of learned positions that stand for nothing
    names: dict[str, str] = field(default_factory=dict)  # tensors that are called otherwise than in TENSORS
    variant: tuple[str, Family] | None = None  # a tensor that tells models of another table, and that table


FALCON_TWO_NORMS = Family(
    "falcon", "Falcon", "tiny", block="parallel", norm="layer", norms=("attention", "ffn", "final"), gated=False,
    activation="gelu", names={"attention_norm": "attn_norm_2", "ffn_norm": "attn_norm"},
)  # fmt: skip

BITNET = Family(
    "bitnet", "BitNet b1.58", "tiny", norms=("attention", "heads", "ffn", "final"), norms_neurons=True,
)  # fmt: skip

FAMILIES = {
    f.architecture: f
    for f in (
        Family(
            "llama", "Llama 2 and 3, Mistral, Mixtral, SmolLM2, ReluLLaMA, ProSparse, TurboSparse-Mistral",
            "SmolLM2-135M, tiny", permuted=True, may_have=("qkv", "output"), mixture=Mixture(),
        ),
        Family("qwen2", "Qwen2, Qwen2.5", "Qwen2.5-Coder-1.5B, tiny", biases=("qkv",)),
        Family("qwen3", "Qwen3", "tiny", norms=("attention", "query", "key", "ffn", "final")),
        Family(
            "qwen3moe", "Qwen3-MoE", "tiny", norms=("attention", "query", "key", "ffn", "final"), mixture=Mixture(),
        ),
        Family(
            "olmoe", "OLMoE", "tiny", norms=("attention", "query", "key", "ffn", "final"),
            mixture=Mixture(normalised=False),
        ),
        Family(
            "smallthinker", "SmallThinker", "tiny", activation="relu", mixture=Mixture(early=True), global_every=4,
            global_first=True, global_unturned=True,
        ),
        Family("smollm3", "SmolLM3", "tiny", permuted=True, unturned_every=4),
        Family(
            "gemma", "Gemma", "tiny", activation="gelu_tanh", scaled_embeddings=True,
        ),
        Family(
            "gemma2", "Gemma 2", "tiny", activation="gelu_tanh", scaled_embeddings=True, global_every=2,
            norms=("attention", "attention_branch", "ffn", "ffn_branch", "final"), scale_by_width=(46,),
        ),
        Family(
            "gemma3", "Gemma 3", "Gemma-3-270M, tiny", activation="gelu_tanh", scaled_embeddings=True, global_every=6,
            norms=("attention", "query", "key", "attention_branch", "ffn", "ffn_branch", "final"),
            local_base=10000.0, scale_by_width=(62,),
        ),
        Family(
            "phi2", "Phi-2", "tiny", block="parallel", norm="layer", norms=("attention", "final"), gated=False,
            activation="gelu_tanh", biases=("qkv", "output", "inputs", "down"), may_have=("head",),
        ),
        Family(
            "falcon", "Falcon", "tiny", block="parallel", norm="layer", norms=("attention", "final"), gated=False,
            activation="gelu", variant=("blk.0.attn_norm_2.weight", FALCON_TWO_NORMS),
        ),
        Family(
            "persimmon", "Persimmon", "tiny", norm="layer", norms=("attention", "query", "key", "ffn", "final"),
            gated=False, activation="relu2", biases=("qkv", "output", "inputs", "down"),
        ),
        Family(
            "nemotron", "Nemotron, Minitron", "tiny", norm="layer", gated=False, activation="relu2",
            may_have=("qkv", "output", "inputs", "down"),
        ),
        BITNET,
        replace(BITNET, architecture="bitnet-b1.58", activation="relu2"),
        Family(
            "opt", "OPT", "tiny", norm="layer", gated=False, activation="relu", rotary=False, position_offset=2,
            biases=("qkv", "output", "inputs", "down"),
        ),
    )
}  # fmt: skip

TENSORS = {
    "attention_norm": "attn_norm",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "heads_norm": "attn_sub_norm",
    "neurons_norm": "ffn_sub_norm",
    "attention_branch_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_branch_norm": "post_ffw_norm",
    "final_norm": "output_norm",
    "qkv": "attn_qkv",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "inputs": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
    "head": "output",
}

EXPERTS = {"gate": "ffn_gate_exps", "inputs": "ffn_up_exps", "down": "ffn_down_exps"}
"""What the stacks of a mixture's matrices are called."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "drelu": "drelu", "fatrelu": "fatrelu",
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
"""Hugging Face's names of activations, and those of the models made sparse afterwards."""

SCORES: dict[int, Scores] = {1: "softmax", 2: "sigmoid"}
"""The gguf package's ExpertGatingFuncType."""

UNSUPPORTED_KEYS = {
    "expert_shared_count": "an expert that every token uses",
    "expert_group_used_count": "experts chosen by groups",
    "attention.clamp_kqv": "a bound on queries, keys and values",
}


def tensor_name(family: Family, part: str, layer: int | None = None) -> str:
    """What the file calls a part of the model or of a layer, without `.weight` or `.bias`."""
    name = family.names.get(part, TENSORS[part])
    return name if layer is None else f"blk.{layer}.{name}"


def family_of(source: Source) -> Family:
    """The family of a model file. Raises DataError naming the families that are supported."""
    family = FAMILIES.get(source.architecture)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise DataError(f"{source.path}: architecture {source.architecture!r} is not supported; known are {known}")
    if family.variant and family.variant[0] in source.names:
        family = family.variant[1]
    if source.number("expert_count", int, 0):
        if family.mixture is None:
            raise DataError(f"{source.path}: a mixture of experts is not supported for {source.architecture!r} yet")
        family = replace(family, names={**family.names, **EXPERTS})
    else:
        family = replace(family, mixture=None)
    for key, what in UNSUPPORTED_KEYS.items():
        name = f"{source.architecture}.{key}"
        if source.metadata(name) not in (None, 0, "none"):
            raise DataError(f"{source.path}: {what} ({name}) is not supported for {source.architecture!r} yet")
    unknown = source.names - _expected_tensors(family, source.number("block_count", int))
    if unknown:
        raise DataError(
            f"{source.path}: tensor {min(unknown)!r} has no place in {source.architecture!r} as flashd knows it"
        )
    return family


def _expected_tensors(family: Family, layers: int) -> set[str]:
    allowed = (*family.norms, *family.biases, *family.may_have)
    names = {"token_embd.weight", "output.weight", "rope_freqs.weight"}
    if family.position_offset:
        names |= {"position_embd.weight", "project_in.weight", "project_out.weight"}
    if "head" in allowed:
        names.add("output.bias")
    norms = {place: f"{place}_norm" for place in (*LAYER_NORMS, "final") if place in allowed}
    names |= {f"{tensor_name(family, norms['final'])}.{kind}" for kind in ("weight", "bias")}
    if family.norms_neurons:
        names |= {f"{tensor_name(family, 'neurons_norm', i)}.weight" for i in range(layers)}
    for i in range(layers):
        parts = ["qkv", "query", "key", "value", "output", "inputs", "down"]
        for part in parts + ["gate"] * family.gated + ["router"] * (family.mixture is not None):
            names.add(f"{tensor_name(family, part, i)}.weight")
        for part in [*(norm for place, norm in norms.items() if place != "final"), *_biased_parts(family, allowed)]:
            names |= {f"{tensor_name(family, part, i)}.{kind}" for kind in ("weight", "bias")}
    return names


def _biased_parts(family: Family, biases: tuple[Place | Bias, ...]) -> list[str]:
    parts = {
        "qkv": ["qkv", "query", "key", "value"], "output": ["output"], "down": ["down"],
        "inputs": ["gate", "inputs"] if family.gated else ["inputs"],
    }  # fmt: skip
    return [part for bias in biases for part in parts.get(bias, [])]


def model_of(source: Source, family: Family) -> Architecture:
    """The model that a file holds. Raises DataError where something is missing or does not fit."""
    heads, hidden = source.number("attention.head_count", int), source.number("embedding_length", int)
    if heads < 1 or hidden < 1:
        raise DataError(f"{source.path}: {heads} heads and a hidden size of {hidden} make no model")
    head_dim = _head_dim(source)
    for name, width in (("hidden size", hidden), ("width of all heads", heads * head_dim)):
        if width % BLOCK:
            raise DataError(f"{source.path}: {name} {width} is not a multiple of {BLOCK}")
    if family.rotary and head_dim % 16:
        raise DataError(f"{source.path}: heads of {head_dim} are not a multiple of 16, which rotary embedding needs")
    layers, experts = source.number("block_count", int), _experts(source, family)
    neurons = source.number("feed_forward_length", int)
    if experts:
        neurons = source.number("expert_feed_forward_length", int, neurons)
    norms = [p for p in (*LAYER_NORMS, "final") if p in family.norms or _has(source, family, p, "weight", "_norm")]
    kinds, layer_kinds = _attention(source, family, layers)
    block: Block = family.block
    if source.metadata(f"{family.architecture}.norm_before") is False:
        block, norms = "post", [p for p in norms if p != "final"]
    width = hidden // heads if layers in family.scale_by_width else head_dim
    activation, threshold = _activation(source, family)
    filled = -(-neurons // BLOCK) * BLOCK
    return Architecture(
        family=family.architecture,
        name=source.text("general.name") if source.has("general.name") else source.path.stem,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=source.number("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        neurons=filled * (experts.count if experts else 1),
        group_neurons=group_neurons(filled, hidden, 2 if family.gated else 1, bool(experts)),
        experts=experts,
        vocabulary=source.tensor("token_embd.weight").shape[0],
        context=_context(source),
        block=block,
        norm=family.norm,
        norm_epsilon=_norm_epsilon(source, family),
        norm_bias=family.norm == "layer" and _has(source, family, "attention", "bias", "_norm"),
        norms=norms,
        norm_heads="query" in norms and _size(source, family, "query_norm") == head_dim,
        biases=[b for b in _BIASES if b in family.biases or _has_bias(source, family, b)],
        gated=family.gated,
        activation=activation,
        threshold=threshold,
        normed_neurons=neurons if family.norms_neurons else 0,
        attention=kinds,
        layer_kinds=layer_kinds,
        ropes=len(rope_tables(source, family)),
        attention_scale=source.number("attention.scale", float, 0.0) or 1 / math.sqrt(width),
        attention_cap=source.number("attn_logit_softcapping", float, 0.0),
        embedding_scale=math.sqrt(hidden) if family.scaled_embeddings else 1.0,
        positions=_positions(source, family),
        logit_cap=source.number("final_logit_softcapping", float, 0.0),
    )


_BIASES: tuple[Bias, ...] = ("qkv", "output", "inputs", "down", "head")


MOST_HEAD_DIM = 4096


def _head_dim(source: Source) -> int:
    fallback = source.number("embedding_length", int) // max(1, source.number("attention.head_count", int))
    head_dim = source.number("attention.key_length", int, fallback)
    if not 1 <= head_dim <= MOST_HEAD_DIM:
        raise DataError(f"{source.path}: heads of {head_dim} values; 1 to {MOST_HEAD_DIM} are possible")
    if source.number("attention.value_length", int, head_dim) != head_dim:
        raise DataError(f"{source.path}: keys and values of different lengths are not supported")
    return head_dim


def _norm_epsilon(source: Source, family: Family) -> float:
    key = "attention.layer_norm_rms_epsilon" if family.norm == "rms" else "attention.layer_norm_epsilon"
    return source.number(key, float)


def _activation(source: Source, family: Family) -> tuple[Activation, float]:
    """(activation, its threshold): the file's own where it names one."""
    key = f"{source.architecture}.hidden_activation"
    name = source.metadata(key)
    if name is None:
        return family.activation, 0.0
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise DataError(f"{source.path}: activation {name!r} ({key}) is not supported; known are {known}")
    return ACTIVATIONS[name], source.number("hidden_activation_threshold", float, 0.0)


def _experts(source: Source, family: Family) -> Experts | None:
    if family.mixture is None:
        return None
    count, used = source.number("expert_count", int), source.number("expert_used_count", int)
    if not 1 <= used <= count:
        raise DataError(f"{source.path}: a token uses {used} experts of {count}, which makes no model")
    kind = source.number("expert_gating_func", int, 0) or 1
    if kind not in SCORES:
        raise DataError(
            f"{source.path}: experts chosen by scores of kind {kind} ({source.architecture}.expert_gating_func) are"
            f" not supported; known are {', '.join(f'{n} ({name})' for n, name in SCORES.items())}"
        )
    stated = source.metadata(f"{source.architecture}.expert_weights_norm")
    return Experts(
        count=count,
        used=used,
        scores=SCORES[kind],
        normalised=family.mixture.normalised if stated is None else bool(stated),
        scale=source.number("expert_weights_scale", float, 0.0) or 1.0,
        early=family.mixture.early,
    )


def _positions(source: Source, family: Family) -> int:
    return source.tensor("position_embd.weight").shape[0] - family.position_offset if family.position_offset else 0


def _has(source: Source, family: Family, part: str, kind: str, suffix: str = "") -> bool:
    layer = None if part in ("final", "head") else 0
    return f"{tensor_name(family, part + suffix, layer)}.{kind}" in source.names


def _has_bias(source: Source, family: Family, bias: Bias) -> bool:
    return any(_has(source, family, part, "bias") for part in ([bias, "query"] if bias == "qkv" else [bias]))


def _size(source: Source, family: Family, part: str) -> int:
    return source.tensor(f"{tensor_name(family, part, 0)}.weight").shape[0]


# --- attention --------------------------------------------------------------------------------------------


def _attention(source: Source, family: Family, layers: int) -> tuple[list[AttentionKind], list[int]]:
    """The kinds of attention of a model, and each layer's."""
    window = source.number("attention.sliding_window", int, 0)
    local_rope = 1 if family.local_base else 0
    kinds: list[AttentionKind] = []
    layer_kinds = []
    for local, turned in zip(_local(source, family, layers), _turned(family, layers), strict=True):
        turned = turned and not (family.global_unturned and window and not local)
        rope = (local_rope if local else 0) if turned else None
        kind = AttentionKind(window=window if local else 0, rope=rope)
        if kind not in kinds:
            kinds.append(kind)
        layer_kinds.append(kinds.index(kind))
    return kinds, layer_kinds


def _local(source: Source, family: Family, layers: int) -> list[bool]:
    """Which layers see a window."""
    pattern = source.metadata(f"{source.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == layers:
        return [bool(p) for p in pattern]
    every = pattern if isinstance(pattern, int) else family.global_every
    return [not every or (i + (not family.global_first)) % every != 0 for i in range(layers)]


def _turned(family: Family, layers: int) -> list[bool]:
    every = family.unturned_every
    return [family.rotary and not (every and (i + 1) % every == 0) for i in range(layers)]


def rope_tables(source: Source, family: Family) -> npt.NDArray[np.float32]:
    """[tables, 2, D / 2] float32: for each pair of a head the angle of one position, and the length it gets.

    Raises DataError for a way of scaling that is not known.
    """
    if not family.rotary:
        return np.zeros((0, 2, _head_dim(source) // 2), np.float32)
    bases = [source.number("rope.freq_base", float, 10000.0)]
    if family.local_base:
        bases.append(source.number("rope.freq_base_swa", float, family.local_base))
    tables = np.zeros((len(bases), 2, _head_dim(source) // 2), np.float64)
    tables[:, 1] = 1
    half = rotary_width(source) // 2
    for table, base in zip(tables, bases, strict=True):
        table[0, :half] = base ** (-np.arange(half) / half)
    _scale_rope(source, tables[0], half, bases[0])
    return tables.astype(np.float32)


def rotary_width(source: Source) -> int:
    """How many of a head's dimensions are turned."""
    head_dim = _head_dim(source)
    width = source.number("rope.dimension_count", int, head_dim)
    if not 2 <= width <= head_dim:
        raise DataError(f"{source.path}: {width} of a head's {head_dim} dimensions cannot be turned")
    return width


def _scale_rope(source: Source, table: npt.NDArray[np.float64], half: int, base: float) -> None:
    """Stretches a table for contexts longer than those of the first training."""
    if "rope_freqs.weight" in source.names:  # Llama 3: a divisor for each pair
        table[0, :half] /= source.tensor("rope_freqs.weight").rows()
    kind = source.metadata(f"{source.architecture}.rope.scaling.type")
    if kind in (None, "none"):
        return
    factor = source.number("rope.scaling.factor", float)
    if kind == "linear":
        table[0] /= factor
    elif kind == "yarn":
        table[0, :half] *= _yarn(source, half, base, factor)
        table[1, :half] = source.number("rope.scaling.attn_factor", float, 0.0) or 0.1 * math.log(factor) + 1
    else:
        raise DataError(f"{source.path}: rotary scaling of kind {kind!r} is not supported; known are linear, yarn")


def _yarn(source: Source, half: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What each pair's angle is multiplied by (arXiv 2309.00071): 1 for the fastest, 1 / factor for the slowest."""
    trained = source.number("rope.scaling.original_context_length", int)

    def pair_of(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(base)

    fast = source.number("rope.scaling.yarn_beta_fast", float, 32.0)
    slow = source.number("rope.scaling.yarn_beta_slow", float, 1.0)
    low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), 2 * half - 1)
    slowed = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    return np.asarray(1 - slowed + slowed / factor)


def _context(source: Source) -> int:
    context = source.number("context_length", int)
    if context < 1:
        raise DataError(f"{source.path}: a context of {context} tokens makes no model")
    return context


def rotary_order(family: Family, heads: int, head_dim: int, rotary: int) -> npt.NDArray[np.int64]:
    """For each row of q or k as the engine wants it, the row of the file that holds it.

    The engine turns dimension i with i + D / 2; of a head that is turned in part, the rest is put between.
    """
    pairs = np.arange(rotary).reshape(-1, 2).T if family.permuted else np.arange(rotary).reshape(2, -1)
    rest = np.arange(rotary, head_dim).reshape(2, -1)
    head = np.concatenate([pairs, rest], axis=1).reshape(-1)
    return np.asarray(np.arange(heads)[:, None] * head_dim + head).reshape(-1)
