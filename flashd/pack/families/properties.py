"""Reads a model's properties, as flashd.bundle.architecture has them, by its family from its keys and tensors."""

from __future__ import annotations

import math
from pathlib import Path

from flashd.bundle.architecture import (
    LAYER_NORMS,
    Activation,
    Architecture,
    Bias,
    Block,
)
from flashd.bundle.layer_kinds import (
    Bound,
    ExpertGroups,
    Experts,
    LeadingFfn,
    Scores,
    SharedExpert,
    Streams,
    TokenInputs,
)
from flashd.bundle.rows.kinds import BLOCK
from flashd.errors import DataError
from flashd.pack.families.attention import (
    attention_kinds,
    head_dim,
    heads_of_keys,
    local_head_dim,
    recurrent_kinds,
)
from flashd.pack.families.family import Family, Mixture, tensor_name
from flashd.pack.families.rope import context_of, latent_scale, rope_tables
from flashd.pack.families.tensors import leading_layers
from flashd.pack.groups import group_neurons
from flashd.pack.names import name_of
from flashd.pack.open_model import OpenModel

MOST_LAYERS = 1024
MOST_TOKEN_INPUTS = 1 << 16
MOST_NEURONS = 1 << 24
MOST_STATES = 16
MOST_DEVIATIONS = 8.0

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "clamped_silu": "clamped_silu",
    "relu": "relu", "relu2": "relu2", "drelu": "drelu", "fatrelu": "fatrelu",
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
"""Hugging Face's names of activations, and those of the models made sparse afterwards."""

OF_THE_CHOSEN = 3
SCORES: dict[int, Scores] = {1: "softmax", 2: "sigmoid", OF_THE_CHOSEN: "softmax"}
"""The gguf package's ExpertGatingFuncType. A softmax of the chosen is one of all that is divided by their sum."""


def check_layers(layers: int, path: Path) -> None:
    """Raises DataError if a file claims more layers than a bundle may have, or none."""
    if not 1 <= layers <= MOST_LAYERS:
        raise DataError(f"{path}: {layers} layers; 1 to {MOST_LAYERS} are possible")


def model_of(model: OpenModel, family: Family, context: int | None = None) -> Architecture:
    """The model that a file holds, for texts of up to `context` tokens, see rope.context_of.

    Raises DataError where something is missing or does not fit.
    """
    heads, hidden = model.number("attention.head_count", int), model.number("embedding_length", int)
    if heads < 1 or hidden < 1:
        raise DataError(f"{model.path}: {heads} heads and a hidden size of {hidden} make no model")
    width = head_dim(model)
    local = local_head_dim(model, family)
    for name, size in (
        ("hidden size", hidden), ("width of all heads", heads * width), ("width of all heads", heads * local),
    ):  # fmt: skip
        if size % BLOCK:
            raise DataError(f"{model.path}: {name} {size} is not a multiple of {BLOCK}")
    for each in {width, local} if family.rotary and not family.latent else ():
        if each % 16:
            raise DataError(f"{model.path}: heads of {each} are not a multiple of 16, which rotary embedding needs")
    layers, experts = model.layers, _experts(model, family)
    own = model.number("expert_feed_forward_length", int, 0) if experts else 0
    widths = [own] if own else _widths(model, family, layers)
    neurons = max(widths)
    # gpt-oss and Qwen3.5 call the norm before the FFN what others call one behind the attention
    taken = {tensor_name(family, f"{place}_norm") for place in family.norms}
    free = {p for p in (*LAYER_NORMS, "final") if tensor_name(family, f"{p}_norm") not in taken}
    norms = [
        place
        for place in (*LAYER_NORMS, "final")
        if place in family.norms or (place in free and _has(model, family, place, "weight", "_norm"))
    ]
    kinds, layer_kinds = attention_kinds(model, family, layers)
    kv_heads, attends = heads_of_keys(model, family, layers, heads)
    block: Block = family.block
    if model.metadata(f"{family.architecture}.norm_before") is False:
        block, norms = "post", [p for p in norms if p != "final"]
    latent = kinds[0].latent
    scaled = hidden // heads if layers in family.scale_by_width else width
    if latent:
        scaled = latent.unturned + latent.turned
    stretched = latent_scale(model) if latent else 1.0
    activation, threshold = _activation(model, family)
    wide = [-(-width // BLOCK) * BLOCK for width in widths]
    filled = -(-neurons // BLOCK) * BLOCK
    return Architecture(
        family=family.architecture,
        name=name_of(model),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        neurons=filled * (experts.count if experts else 1),
        layer_neurons=wide if len(set(wide)) > 1 else [],
        group_neurons=group_neurons(math.gcd(filled, *wide), hidden, 2 if family.gated else 1, bool(experts)),
        experts=experts,
        vocabulary=model.tensor("token_embd.weight").shape[0],
        context=context_of(model, context),
        block=block,
        norm=family.norm,
        norm_epsilon=_norm_epsilon(model, family),
        norm_bias=family.norm == "layer" and _has(model, family, "attention", "bias", "_norm"),
        norms=norms,
        norm_heads="query" in norms and _size(model, family, "query_norm") in (width, local),
        norm_turned=family.norm_turned,
        norm_values=family.norm_values,
        biases=[b for b in _BIASES if b in family.biases or _has_bias(model, family, b)],
        sinks=family.sinks,
        gated=family.gated,
        activation=activation,
        threshold=threshold,
        normed_neurons=neurons if family.norms_neurons else 0,
        attention=kinds,
        attention_gated=family.attention_gated,
        recurrent=recurrent_kinds(model, family, attends),
        layer_kinds=[kind if has else len(kinds) for kind, has in zip(layer_kinds, attends, strict=True)],
        ropes=len(rope_tables(model, family, context)),
        attention_scale=(model.number("attention.scale", float, family.attention_scale) or 1 / math.sqrt(scaled))
        * stretched,
        attention_cap=model.number("attn_logit_softcapping", float, 0.0),
        embedding_scale=model.number(
            "embedding_scale", float, math.sqrt(hidden) if family.scaled_embeddings else 1.0
        ),
        branch_scale=model.number("residual_scale", float, 1.0),
        token_inputs=_token_inputs(model, family),
        streams=_streams(model) if family.streams else None,
        laurel_rank=_size(model, family, "laurel_left") if "laurel_branch" in norms else 0,
        bounds=_bounds(model, _widths(model, family, layers)) if family.bounded else [],
        layer_scales=family.layer_scales and _has(model, family, "scale", "weight"),
        positions=_positions(model, family),
        logit_cap=model.number("final_logit_softcapping", float, 0.0),
    )


_BIASES: tuple[Bias, ...] = ("qkv", "output", "router", "inputs", "down", "head")


def _norm_epsilon(model: OpenModel, family: Family) -> float:
    rms = (family.norm == "rms") != family.other_epsilon
    key = "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"
    if family.halves and not model.has(f"{model.architecture}.{key}"):
        key = "attention.layer_norm_epsilon"  # as llama.cpp reads Nemotron-H's
    return model.number(key, float)


def _activation(model: OpenModel, family: Family) -> tuple[Activation, float]:
    """(activation, its threshold): the file's own where it names one."""
    key = f"{model.architecture}.hidden_activation"
    name = model.metadata(key)
    if name is None:
        return family.activation, 0.0
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise DataError(f"{model.path}: activation {name!r} ({key}) is not supported; known are {known}")
    return ACTIVATIONS[name], model.number("hidden_activation_threshold", float, 0.0)


def _experts(model: OpenModel, family: Family) -> Experts | None:
    if family.mixture is None:
        return None
    count, used = model.number("expert_count", int), model.number("expert_used_count", int)
    if not 1 <= used <= count:
        raise DataError(f"{model.path}: a token uses {used} experts of {count}, which makes no model")
    kind = model.number("expert_gating_func", int, 0)
    if kind not in SCORES and kind:
        raise DataError(
            f"{model.path}: experts chosen by scores of kind {kind} ({model.architecture}.expert_gating_func) are"
            f" not supported; known are {', '.join(f'{n} ({name})' for n, name in SCORES.items())}"
        )
    scores = SCORES[kind] if kind else family.mixture.scores
    stated = model.metadata(f"{model.architecture}.expert_weights_norm")
    return Experts(
        count=count,
        used=used,
        scores=scores,
        normalised=kind == OF_THE_CHOSEN or (family.mixture.normalised if stated is None else bool(stated)),
        scale=model.number("expert_weights_scale", float, 0.0) or 1.0,
        early=family.mixture.early,
        shared=_shared(model, family.mixture) if family.mixture.shared else None,
        leaned=family.mixture.leaned and _has(model, family, "choice", "bias"),
        router_scaled=family.mixture.scaled,
        weights_scaled=family.mixture.scaled,
        margin=2 * model.number("router_jitter_noise", float, 0.01) if scores == "sparsemixer" else 0.0,
        groups=_expert_groups(model, count, used, family.mixture.best or 1 + (scores != "softmax"))
        if family.mixture.grouped
        else None,
        first=(first := leading_layers(model, family)),
        leading=_leading(model, family) if first else None,
    )


def _expert_groups(model: OpenModel, experts: int, used: int, best: int) -> ExpertGroups | None:
    """The groups that a token chooses among: by their best expert (DeepSeek-V2), or their two best (V3 and later)."""
    count, taken = model.number("expert_group_count", int, 0) or 1, model.number("expert_group_used_count", int, 0)
    taken = taken or count
    each = experts // max(1, count)
    if not 1 <= taken <= count or experts % count or used > taken * each or (taken < count and each < best):
        raise DataError(
            f"{model.path}: a token uses {used} experts of {taken} of {count} groups that {experts} make, which is no"
            " mixture"
        )
    return ExpertGroups(count=count, used=taken, best=best) if taken < count else None


def _shared(model: OpenModel, mixture: Mixture) -> SharedExpert | None:
    """What all tokens use: its width, or how many are as wide as the others; None if there are none."""
    count = model.number("expert_shared_count", int, 0)
    stated = count and count * model.number("expert_feed_forward_length", int)
    # one that is weighed is always there, and its width is stated
    neurons = model.number("expert_shared_feed_forward_length", int, None if mixture.weighed else stated)
    if mixture.dense:
        neurons = model.number("feed_forward_length", int)
    if not neurons and not mixture.weighed:
        return None
    if neurons < 1 or neurons % BLOCK:
        raise DataError(f"{model.path}: an expert for all tokens with {neurons} neurons, no multiple of {BLOCK}")
    return SharedExpert(neurons=neurons, weighed=mixture.weighed)


def _widths(model: OpenModel, family: Family, layers: int) -> list[int]:
    """The neurons of each layer's FFN. Raises DataError if the file does not say it of each."""
    key = f"{model.architecture}.feed_forward_length"
    stated = model.metadata(key)
    if not family.sized_ffns or not isinstance(stated, list):
        width = model.number("feed_forward_length", int)
        if not 1 <= width <= MOST_NEURONS:
            raise DataError(f"{model.path}: an FFN of {width} neurons makes no model")
        return [width] * layers
    least = 0 if family.halves else 1
    widths = [width for width in stated if isinstance(width, int) and least <= width <= MOST_NEURONS]
    if not len(stated) == len(widths) == layers or not any(widths):
        raise DataError(f"{model.path}: {key} is {str(stated)[:60]}, which makes no model of {layers} layers")
    return widths


def _token_inputs(model: OpenModel, family: Family) -> TokenInputs | None:
    """As transformers and llama.cpp scale them: the sum of two parts of equal size keeps that size."""
    width = model.number("embedding_length_per_layer_input", int, 0) if family.token_inputs else 0
    if not width:
        return None
    if not 0 < width <= MOST_TOKEN_INPUTS or width % BLOCK:
        raise DataError(f"{model.path}: {width} numbers of a token for each layer are not a multiple of {BLOCK}")
    hidden = model.number("embedding_length", int)
    return TokenInputs(width=width, scale=math.sqrt(width), projected=1 / math.sqrt(hidden), both=math.sqrt(0.5))


def _streams(model: OpenModel) -> Streams:
    count = model.number("altup.num_inputs", int)
    if not 2 <= count <= MOST_STATES or model.number("altup.active_idx", int, 0):
        raise DataError(
            f"{model.path}: {count} states of a token (altup), of which layers compute with another than the first,"
            f" or that are not 2 to {MOST_STATES}"
        )
    return Streams(count=count)


def _bounds(model: OpenModel, widths: list[int]) -> list[Bound | None]:
    """Of each layer: by how many standard deviations the bound is above the mean; minus infinity: there is none."""
    key = f"{model.architecture}.activation_sparsity_scale"
    stated = model.metadata(key)
    scales = [float(each) for each in stated if isinstance(each, int | float)] if isinstance(stated, list) else []
    if len(scales) != len(widths) or not all(scale == -math.inf or abs(scale) <= MOST_DEVIATIONS for scale in scales):
        raise DataError(f"{model.path}: {key} is {str(stated)[:60]}, which makes no model of {len(widths)} layers")
    bounds = [
        None if scale == -math.inf else Bound(neurons=width, deviations=scale)
        for scale, width in zip(scales, widths, strict=True)
    ]
    return bounds if any(bounds) else []


def _leading(model: OpenModel, family: Family) -> LeadingFfn:
    """The FFN of first layers that have no experts."""
    filled = -(-model.number("feed_forward_length", int) // BLOCK) * BLOCK
    if filled < 1:
        raise DataError(f"{model.path}: first layers without experts and without neurons make no model")
    hidden, inputs = model.number("embedding_length", int), 2 if family.gated else 1
    return LeadingFfn(neurons=filled, group_neurons=group_neurons(filled, hidden, inputs, False))


def _positions(model: OpenModel, family: Family) -> int:
    return model.tensor("position_embd.weight").shape[0] - family.position_offset if family.position_offset else 0


def _has(model: OpenModel, family: Family, part: str, kind: str, suffix: str = "") -> bool:
    # the first layers may have no experts
    layer = None if part in ("final", "head") else leading_layers(model, family) if part == "choice" else 0
    return f"{tensor_name(family, part + suffix, layer)}.{kind}" in model.names


def _has_bias(model: OpenModel, family: Family, bias: Bias) -> bool:
    return any(_has(model, family, part, "bias") for part in ([bias, "query"] if bias == "qkv" else [bias]))


def _size(model: OpenModel, family: Family, part: str) -> int:
    layers = range(model.layers)
    names = [name for i in layers if (name := f"{tensor_name(family, part, i)}.weight") in model.names]
    return model.tensor(names[0] if names else f"{tensor_name(family, part, 0)}.weight").shape[0]
