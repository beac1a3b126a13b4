"""What a file of a family may hold; a file that holds anything else is refused by name."""

from __future__ import annotations

from flashd.bundle.architecture import LAYER_NORMS, Bias, Place
from flashd.errors import DataError
from flashd.pack.families.family import Family, tensor_name
from flashd.pack.open_model import OpenModel

UNSUPPORTED_KEYS = {
    "expert_shared_count": "an expert that every token uses",
    "expert_group_used_count": "experts chosen by groups",
    "attention.clamp_kqv": "a bound on queries, keys and values",
}


def check_keys(model: OpenModel) -> None:
    """Raises DataError for a property that changes answers and is not supported."""
    for key, what in UNSUPPORTED_KEYS.items():
        name = f"{model.architecture}.{key}"
        if model.metadata(name) not in (None, 0, "none"):
            raise DataError(f"{model.path}: {what} ({name}) is not supported for {model.architecture!r} yet")


def check_tensors(model: OpenModel, family: Family) -> None:
    """Raises DataError for a tensor that nothing reads."""
    unknown = model.names - _expected(family, model.number("block_count", int))
    if unknown:
        raise DataError(
            f"{model.path}: tensor {min(unknown)!r} has no place in {model.architecture!r} as flashd knows it"
        )


def _expected(family: Family, layers: int) -> set[str]:
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
