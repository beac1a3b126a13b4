"""The kinds of attention that a model has, what layers have in its place, and which layer is of which kind."""

from __future__ import annotations

from flashd.bundle.architecture import AttentionKind, ShortConvolution
from flashd.errors import DataError
from flashd.pack.families.family import Family
from flashd.pack.open_model import OpenModel

MOST_HEAD_DIM = 4096
MOST_TAPS = 64


def head_dim(model: OpenModel) -> int:
    fallback = model.number("embedding_length", int) // max(1, model.number("attention.head_count", int))
    width = model.number("attention.key_length", int, fallback)
    if not 1 <= width <= MOST_HEAD_DIM:
        raise DataError(f"{model.path}: heads of {width} values; 1 to {MOST_HEAD_DIM} are possible")
    if model.number("attention.value_length", int, width) != width:
        raise DataError(f"{model.path}: keys and values of different lengths are not supported")
    return width


def heads_of_keys(model: OpenModel, family: Family, layers: int, heads: int) -> tuple[int, list[bool]]:
    """(heads of keys and values, which layers have them). Raises DataError if layers that have some have others."""
    key = f"{model.architecture}.attention.head_count_kv"
    stated = model.metadata(key)
    if not family.convolves or not isinstance(stated, list):
        return model.number("attention.head_count_kv", int, heads), [True] * layers
    counts = {count for count in stated if count}
    if len(stated) != layers or len(counts) != 1 or not isinstance(count := counts.pop(), int):
        raise DataError(f"{model.path}: {key} is {str(stated)[:60]}, which makes no model of {layers} layers")
    return count, [bool(each) for each in stated]


def short_convolutions(model: OpenModel, attends: list[bool]) -> list[ShortConvolution]:
    """What the layers have that do not attend."""
    if all(attends):
        return []
    taps = model.number("shortconv.l_cache", int)
    if not 2 <= taps <= MOST_TAPS:
        raise DataError(f"{model.path}: convolutions of {taps} tokens; 2 to {MOST_TAPS} are possible")
    return [ShortConvolution(taps=taps)]


def has_local_rope(model: OpenModel, family: Family) -> bool:
    """Whether layers that see a window have a rotary table of their own."""
    return bool(family.local_base or (family.local_unscaled and model.number("attention.sliding_window", int, 0)))


def attention_kinds(model: OpenModel, family: Family, layers: int) -> tuple[list[AttentionKind], list[int]]:
    """The kinds of attention of a model, and each layer's."""
    window = model.number("attention.sliding_window", int, 0)
    local_rope = int(has_local_rope(model, family))
    kinds: list[AttentionKind] = []
    layer_kinds = []
    for local, turned in zip(_local(model, family, layers), _turned(family, layers), strict=True):
        turned = turned and not (family.global_unturned and window and not local)
        rope = (local_rope if local else 0) if turned else None
        kind = AttentionKind(window=window if local else 0, rope=rope)
        if kind not in kinds:
            kinds.append(kind)
        layer_kinds.append(kinds.index(kind))
    return kinds, layer_kinds


def _local(model: OpenModel, family: Family, layers: int) -> list[bool]:
    """Which layers see a window."""
    pattern = model.metadata(f"{model.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == layers:
        return [bool(p) for p in pattern]
    every = pattern if isinstance(pattern, int) else family.global_every
    return [not every or (i + (not family.global_first)) % every != 0 for i in range(layers)]


def _turned(family: Family, layers: int) -> list[bool]:
    every = family.unturned_every
    return [family.rotary and not (every and (i + 1) % every == 0) for i in range(layers)]
