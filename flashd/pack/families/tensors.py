"""What a file of a family may hold; a file that holds anything else is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from flashd.bundle.architecture import LAYER_NORMS, Bias, Place
from flashd.errors import DataError
from flashd.pack.families.family import ENDLESS, PLAIN, Family, Mixture, tensor_name
from flashd.pack.families.rope import LONG, SHORT, unknown_scaling
from flashd.pack.open_model import OpenModel

TURNED = "rope.scaling.finetuned"
"""Whether queries and keys are turned, in families that may or may not; elsewhere it says nothing."""

READ = frozenset((
    "context_length", "embedding_length", "block_count", "feed_forward_length", "hidden_activation",
    "hidden_activation_threshold", "norm_before", "attn_logit_softcapping", "final_logit_softcapping",
    "shortconv.l_cache",
    *(f"attention.{key}" for key in (
        "head_count", "head_count_kv", "key_length", "value_length", "layer_norm_rms_epsilon", "layer_norm_epsilon",
        "sliding_window", "sliding_window_pattern", "scale",
    )),
    *(f"expert_{key}" for key in (
        "count", "used_count", "feed_forward_length", "gating_func", "weights_norm", "weights_scale",
        "shared_feed_forward_length",
    )),
    *(f"rope.{key}" for key in (
        "dimension_count", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor",
        "scaling.attn_factor", "scaling.original_context_length", "scaling.yarn_ext_factor",
        "scaling.yarn_attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow", "scaling.yarn_truncate",
    )),
))  # fmt: skip
"""The keys below the architecture's name that the recipe reads; a family may read others beside them."""

NEEDLESS = frozenset((
    "vocab_size", "tensor_data_layout", "use_parallel_residual", TURNED, "attention.causal",
    "expert_group_count", "moe_every_n_layers", "pooling_type",
))  # fmt: skip
"""Keys that say nothing that is not known from elsewhere."""

OF_OTHER_PARTS = ("vision.", "mm.", "audio.")
"""Beginnings of the keys of what a model has beside its text part."""

INERT: tuple[object, ...] = (None, 0, 1.0, "none", [])
"""Values of scales, counts and flags that change nothing."""

LEADING = "leading_dense_block_count"
USED_GROUPS = "expert_group_used_count"

UNSUPPORTED_KEYS = {
    "expert_shared_count": "an expert that every token uses",
    LEADING: "a first layer without experts",
    USED_GROUPS: "experts chosen by groups",
    "attention.clamp_kqv": "a bound on queries, keys and values",
}


STATES = ["stream_norm", "stream_router", "stream_predict", "stream_correct", "stream_scale"]
"""The parts of a layer of a model whose tokens have several states."""

MOST_NAMED = 20
"""Kinds of tensors, and keys, that a refusal names."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def lacking(model: OpenModel, family: Family) -> list[str]:
    """All that a model has and flashd has not: what changes answers, and keys and tensors that nothing reads."""
    before = f"{model.architecture}."
    stated = {key: model.metadata(f"{before}{key}") for key in UNSUPPORTED_KEYS}
    unsupported = [
        f"{UNSUPPORTED_KEYS[key]} ({before}{key}) is not supported for {model.architecture!r} yet"
        for key, value in stated.items()
        if value not in (None, 0, "none") and key not in _of_mixtures(family)
    ]
    keys = [
        f"flashd does not know what {name} means (its value: {str(model.metadata(name))[:60]})"
        for name in _unknown_keys(model, family)
        if name.removeprefix(before) not in UNSUPPORTED_KEYS
    ]
    place = f"in {model.architecture!r} as flashd knows it"
    tensors = [
        f"tensor {name!r} has no place {place}" + (f" (and {others} more like it)" if others else "")
        for name, others in _kinds(_unexpected(model, family)).items()
    ]
    rotary = unknown_scaling(model) if family.rotary else []
    stated_otherwise = _shortened(list(model.unknown), "properties")
    return [
        *unsupported,
        *stated_otherwise,
        *rotary,
        *_shortened(keys, "keys"),
        *_shortened(tensors, "kinds of tensors"),
    ]


def beyond(model: OpenModel, family: Family) -> str:
    """The keys and tensors of a model of an unknown architecture that a model of `family` has not; empty if none."""
    keys = _shortened(_unknown_keys(model, family), "keys")
    tensors = _shortened(list(_kinds(_unexpected(model, family))), "kinds")
    return "; ".join(
        f"{what} {', '.join(names)}" for what, names in (("the keys", keys), ("the tensors", tensors)) if names
    )


def _shortened(texts: list[str], what: str) -> list[str]:
    left = len(texts) - MOST_NAMED
    return [*texts[:MOST_NAMED], f"and {left} more {what}"] if left > 0 else texts


def _unknown_keys(model: OpenModel, family: Family) -> list[str]:
    """The names of keys that nothing reads, and whose value changes something."""
    before, read = f"{model.architecture}.", {*READ, *family.reads, *NEEDLESS, *_of_mixtures(family)}
    names = [name for name in sorted(model.keys) if name.startswith(before)]
    return [
        name
        for name in names
        if (key := name.removeprefix(before)) not in read
        and not key.startswith(OF_OTHER_PARTS)
        and model.metadata(name) not in INERT
    ]


def _kinds(names: Iterable[str]) -> dict[str, int]:
    """The first of each kind of tensor, and how many others there are. The numbers of layers make no kind."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(_NUMBER.sub("N", name), []).append(name)
    return {alike[0]: len(alike) - 1 for alike in found.values()}


def _unexpected(model: OpenModel, family: Family) -> set[str]:
    """The names of tensors that have no place, but for those of layers behind the model's last."""
    behind = tuple(f"blk.{i}." for i in range(model.layers, model.number("block_count", int)))
    return {name for name in model.names - _expected(model, family) if not name.startswith(behind)}


def leading_layers(model: OpenModel, family: Family) -> int:
    """How many first layers of a mixture have an FFN in place of experts. Raises DataError if none has experts."""
    if family.mixture is None or not family.mixture.leading:
        return 0
    leading, layers = model.number(LEADING, int, 0), model.layers
    if not 0 <= leading < layers:
        raise DataError(
            f"{model.path}: of {layers} layers the first {leading} have no experts, which makes no mixture"
        )
    return leading


def _of_mixtures(family: Family) -> set[str]:
    """The keys that only families with such mixtures read."""
    mixture = family.mixture or Mixture()
    shared, groups = ["expert_shared_count"] * mixture.shared, [USED_GROUPS] * mixture.grouped
    return {*([LEADING] * mixture.leading), *shared, *groups}


def _expected(model: OpenModel, family: Family) -> set[str]:
    layers, leading = model.layers, leading_layers(model, family)
    mixture = family.mixture or Mixture()
    allowed = (*family.norms, *family.biases, *family.may_have)
    names = {"token_embd.weight", "output.weight", "rope_freqs.weight", LONG, SHORT}
    if family.position_offset:
        names |= {"position_embd.weight", "project_in.weight", "project_out.weight"}
    if "head" in allowed:
        names.add("output.bias")
    if family.token_inputs:
        names |= {
            f"{tensor_name(family, part)}.weight" for part in ("token_inputs", "token_projection", "token_norm")
        }
    if family.streams:
        states = [tensor_name(family, part) for part in ("stream_projection", "stream_out")]
        numbers = range(model.number("altup.num_inputs", int, 1) - 1)
        names |= {f"{name}{end}.weight" for name in states for end in ("", *(f".{number}" for number in numbers))}
    norms = {place: f"{place}_norm" for place in (*LAYER_NORMS, "final") if place in allowed}
    names |= {f"{tensor_name(family, norms['final'])}.{kind}" for kind in ("weight", "bias")}
    if family.norms_neurons:
        names |= {f"{tensor_name(family, 'neurons_norm', i)}.weight" for i in range(layers)}
    for i in range(layers):
        parts = [*_of_latents(model), "output"] if family.latent else ["qkv", "query", "key", "value", "output"]
        parts += ["sinks"] * family.sinks
        parts += ["in_proj", "out_proj", "conv"] * family.convolves
        names |= _of_delta_nets(family, i) if family.delta_nets else set()
        names |= _of_mamba(family, i) if family.mamba else set()
        parts += ["token_gate", "token_out"] * family.token_inputs + ["scale"] * family.layer_scales
        parts += STATES * family.streams + ["laurel_left", "laurel_right"] * ("laurel_branch" in allowed)
        joined = family.joined_inputs or (family.joined_experts and i >= leading)
        ffn = ["inputs", "down"] + ["gate"] * (family.gated and not joined)
        if i < leading:
            names |= {f"blk.{i}.{PLAIN[part]}.weight" for part in ffn}
        else:
            parts += [*ffn, *["router"] * (family.mixture is not None)]
            parts += ["shared_gate", "shared_up", "shared_down"] * mixture.shared
            parts += ["shared_weight"] * mixture.weighed
            scaled = ["router", "down"] * mixture.scaled
            names |= {f"{tensor_name(family, part, i)}.scale" for part in scaled}
            names |= {f"{tensor_name(family, 'choice', i)}.bias"} if mixture.leaned else set()
        for part in parts:
            names.add(f"{tensor_name(family, part, i)}.weight")
        for part in [*(norm for place, norm in norms.items() if place != "final"), *_biased_parts(family, allowed)]:
            names |= {f"{tensor_name(family, part, i)}.{kind}" for kind in ("weight", "bias")}
    return names


def _of_latents(model: OpenModel) -> list[str]:
    queries = ["query_down", "query_up", "query_latent_norm"] if model.number("attention.q_lora_rank", int, 0) else []
    return [*(queries or ["query"]), "latent_down", "latent_norm", "key_up", "value_up", "both_up"]


def _of_delta_nets(family: Family, i: int) -> set[str]:
    assert family.delta_nets
    rates = ["rates"] if family.delta_nets.joined_rates else ["beta", "alpha"]
    parts = ["z", "mixed", "delta_out", "delta_conv", "delta_norm", *rates]
    names = {f"{tensor_name(family, part, i)}.weight" for part in parts}
    return names | {tensor_name(family, "decay", i), f"{tensor_name(family, 'dt', i)}.bias"}


def _of_mamba(family: Family, i: int) -> set[str]:
    weights = {f"{tensor_name(family, part, i)}.weight" for part in ("mamba_in", "mamba_norm", "mamba_out")}
    convolution = {f"{tensor_name(family, 'mamba_conv', i)}.{kind}" for kind in ("weight", "bias")}
    bare = {tensor_name(family, part, i) for part in ENDLESS}
    return weights | convolution | bare | {f"{tensor_name(family, 'dt', i)}.bias"}


def _biased_parts(family: Family, biases: tuple[Place | Bias, ...]) -> list[str]:
    parts = {
        "qkv": ["qkv", "query", "key", "value"], "output": ["output"], "down": ["down"], "router": ["router"],
        "inputs": ["gate", "inputs"] if family.gated else ["inputs"],
    }  # fmt: skip
    return [part for bias in biases for part in parts.get(bias, [])]
