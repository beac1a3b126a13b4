"""The kinds of attention that a model has, what layers have in its place, and which layer is of which kind."""

from __future__ import annotations

import msgspec

from flashd.bundle.layer_kinds import AttentionKind, GatedDeltaNet, Latent, Mamba2, Recurrent, ShortConvolution
from flashd.bundle.rows.kinds import BLOCK
from flashd.errors import DataError
from flashd.pack.families.family import DeltaNets, Family, tensor_name
from flashd.pack.open_model import OpenModel

MOST_HEAD_DIM = MOST_HEADS = 4096
MOST_TAPS = 64


def head_dim(model: OpenModel) -> int:
    """The width of a head, of layers that see all tokens if the others have another; or of what a token keeps."""
    if rank := model.number("attention.kv_lora_rank", int, 0):
        return rank + turned_of_latent(model)
    fallback = model.number("embedding_length", int) // max(1, model.number("attention.head_count", int))
    return _width(model, "", fallback)


def turned_of_latent(model: OpenModel) -> int:
    """How many numbers of a head are turned, if heads look at one row of a token."""
    return model.number("rope.dimension_count", int)


def latent_of(model: OpenModel, family: Family) -> Latent | None:
    """What is kept of a token in place of each head's keys and values. Raises DataError if its sizes make none.

    Older files have no keys for the heads that llama.cpp does without (key_length_mla), and say theirs by the usual
    ones.
    """
    if not family.latent:
        return None
    rank, turned = model.number("attention.kv_lora_rank", int), turned_of_latent(model)
    query_rank = model.number("attention.q_lora_rank", int, 0)
    end = "_mla" if model.has(f"{model.architecture}.attention.key_length_mla") else ""
    keys, values = (model.number(f"attention.{part}_length{end}", int) for part in ("key", "value"))
    sizes = {"rank": rank, "turned": turned, "unturned": keys - turned, "values": values, "query_rank": query_rank}
    heads = model.number("attention.head_count", int)
    if heads * values % BLOCK:
        raise DataError(f"{model.path}: {heads} heads of {values} values are not a multiple of {BLOCK}")
    try:
        return msgspec.convert(sizes, Latent)
    except msgspec.ValidationError as error:
        raise DataError(
            f"{model.path}: heads of {keys} numbers, {turned} of them turned, and of {values} values, with latents of"
            f" {rank} and {query_rank} numbers, which flashd cannot compute ({error})"
        ) from error


def local_head_dim(model: OpenModel, family: Family) -> int:
    """The width of a head of layers that see a window."""
    return _width(model, "_swa", head_dim(model)) if family.sized_heads else head_dim(model)


def _width(model: OpenModel, end: str, fallback: int) -> int:
    width = model.number(f"attention.key_length{end}", int, fallback)
    if not 1 <= width <= MOST_HEAD_DIM:
        raise DataError(f"{model.path}: heads of {width} values; 1 to {MOST_HEAD_DIM} are possible")
    if model.number(f"attention.value_length{end}", int, width) != width:
        raise DataError(f"{model.path}: keys and values of different lengths are not supported")
    return width


def heads_of_keys(model: OpenModel, family: Family, layers: int, heads: int) -> tuple[int, list[bool]]:
    """(heads of keys and values, which layers have them). Raises DataError if layers that have some have others.

    In families whose heads have several sizes, those of the last layer.
    """
    key = f"{model.architecture}.attention.head_count_kv"
    stated = model.metadata(key)
    if family.latent:
        return 1, [True] * layers
    if family.delta_nets:
        return model.number("attention.head_count_kv", int, heads), _between_delta_nets(model, layers)
    if family.sized_heads:
        return _kv_heads(model, layers, heads)[-1], [True] * layers
    if not (family.convolves or family.mamba == "instead") or not isinstance(stated, list):
        return model.number("attention.head_count_kv", int, heads), [True] * layers
    counts = {count for count in stated if count}
    if len(stated) != layers or len(counts) != 1 or not isinstance(count := counts.pop(), int):
        raise DataError(f"{model.path}: {key} is {str(stated)[:60]}, which makes no model of {layers} layers")
    return count, [bool(each) for each in stated]


def _kv_heads(model: OpenModel, layers: int, heads: int) -> list[int]:
    """Heads of keys and values of each layer. Raises DataError if the file does not say it of each."""
    key = f"{model.architecture}.attention.head_count_kv"
    stated = model.metadata(key)
    if not isinstance(stated, list):
        return [model.number("attention.head_count_kv", int, heads)] * layers
    counts = [count for count in stated if isinstance(count, int) and 1 <= count <= heads and heads % count == 0]
    if not len(stated) == len(counts) == layers:
        raise DataError(f"{model.path}: {key} is {str(stated)[:60]}, which makes no model of {layers} layers")
    return counts


def _between_delta_nets(model: OpenModel, layers: int) -> list[bool]:
    """Which layers attend, in a model whose others are delta nets."""
    key = f"{model.architecture}.attention.recurrent_layers"
    stated = model.metadata(key)
    if isinstance(stated, list):
        # a file may count the layers that guess further tokens too
        if len(stated) < layers or all(stated[:layers]):
            raise DataError(f"{model.path}: {key} is {str(stated)[:60]}, which makes no model of {layers} layers")
        return [not each for each in stated[:layers]]
    every = model.number("full_attention_interval", int, 4)
    if not 1 <= every <= layers:
        raise DataError(f"{model.path}: of {layers} layers each {every}th attends, which makes no model")
    return [(i + 1) % every == 0 for i in range(layers)]


def recurrent_kinds(model: OpenModel, family: Family, attends: list[bool]) -> list[Recurrent]:
    """What the layers have that do not attend."""
    if all(attends) and family.mamba != "beside":
        return []
    taps = model.number("shortconv.l_cache" if family.convolves else "ssm.conv_kernel", int)
    if not 2 <= taps <= MOST_TAPS:
        raise DataError(f"{model.path}: convolutions of {taps} tokens; 2 to {MOST_TAPS} are possible")
    if family.delta_nets:
        return [_delta_net(model, family.delta_nets, taps)]
    return [_mamba(model, family, taps) if family.mamba else ShortConvolution(taps=taps)]


def _mamba(model: OpenModel, family: Family, taps: int) -> Mamba2:
    groups, heads, state, inner = (
        model.number(f"ssm.{key}", int) for key in ("group_count", "time_step_rank", "state_size", "inner_size")
    )
    fits = 1 <= groups <= heads <= MOST_HEADS and heads % groups == 0 and 1 <= state <= MOST_HEAD_DIM
    if not fits or not heads <= inner <= heads * MOST_HEAD_DIM or inner % heads or inner % BLOCK:
        raise DataError(
            f"{model.path}: Mamba-2 mixers of {groups} groups, whose states are {state} wide, and {heads} heads,"
            f" {inner} wide together, which make no model"
        )
    norm = f"{tensor_name(family, 'mamba_norm')}.weight"
    return Mamba2(
        taps=taps, groups=groups, heads=heads, state=state, head_dim=inner // heads,
        normed=family.mamba == "instead" or any(name.endswith(norm) for name in model.names),
    )  # fmt: skip


def _delta_net(model: OpenModel, family: DeltaNets, taps: int) -> GatedDeltaNet:
    keys, values, width = (
        model.number(f"ssm.{key}", int) for key in ("group_count", "time_step_rank", "state_size")
    )  # fmt: skip
    inner = model.number("ssm.inner_size", int)
    fits = 1 <= keys <= values <= MOST_HEADS and values % keys == 0 and 1 <= width <= MOST_HEAD_DIM
    if not fits or not values <= inner <= values * MOST_HEAD_DIM or inner % values or inner % BLOCK:
        raise DataError(
            f"{model.path}: delta nets of {keys} heads of keys, {width} wide, and {values} of values, {inner} wide"
            " together, which make no model"
        )
    return GatedDeltaNet(
        taps=taps, key_heads=keys, value_heads=values, key_dim=width, value_dim=inner // values,
        tiled=family.tiled and keys < values,
    )  # fmt: skip


def has_local_rope(model: OpenModel, family: Family) -> bool:
    """Whether layers that see a window have a rotary table of their own."""
    return bool(family.local_base or (family.local_unscaled and model.number("attention.sliding_window", int, 0)))


def attention_kinds(model: OpenModel, family: Family, layers: int) -> tuple[list[AttentionKind], list[int]]:
    """The kinds of attention of a model, and each layer's."""
    window = model.number("attention.sliding_window", int, 0)
    longest = model.number("context_length", int)  # a window of as many tokens is none
    local_rope = int(has_local_rope(model, family))
    wide, narrow, latent = head_dim(model), local_head_dim(model, family), latent_of(model, family)
    heads = model.number("attention.head_count", int)
    kv_heads = heads_of_keys(model, family, layers, heads)[0]
    each = _kv_heads(model, layers, heads) if family.sized_heads else [kv_heads] * layers
    own = layers - _borrowing(model, family, layers)
    kinds: list[AttentionKind] = []
    layer_kinds: list[int] = []
    for i, (local, turned) in enumerate(zip(_local(model, family, layers), _turned(family, layers), strict=True)):
        turned = turned and not (family.global_unturned and window and not local)
        rope = (local_rope if local else 0) if turned else None
        kind = AttentionKind(
            window=window if local and window < longest else 0, rope=rope,
            head_dim=narrow if local and narrow != wide else 0,
            kv_heads=each[i] if each[i] != kv_heads else 0,
            values=not family.sized_heads or i >= own or f"blk.{i}.attn_v.weight" in model.names,
            beside=0 if family.mamba == "beside" else None,
            latent=latent,
        )  # fmt: skip
        if i >= own:
            kind = _borrower(model, i, [kinds[number] for number in layer_kinds[:own]], kind)
        if kind not in kinds:
            kinds.append(kind)
        layer_kinds.append(kinds.index(kind))
    return kinds, layer_kinds


def _borrowing(model: OpenModel, family: Family, layers: int) -> int:
    """How many of the last layers look at the keys and values of earlier ones."""
    count = model.number("attention.shared_kv_layers", int, 0) if family.borrows else 0
    if not 0 <= count < layers:
        raise DataError(f"{model.path}: {count} of {layers} layers share keys and values, which makes no model")
    return count


def _borrower(model: OpenModel, layer: int, before: list[AttentionKind], kind: AttentionKind) -> AttentionKind:
    """The kind of a layer that looks at what the last of those before, which sees as much, has kept."""
    lender = next((each for each in reversed(before) if bool(each.window) == bool(kind.window)), None)
    if lender is None or (lender.head_dim, lender.kv_heads) != (kind.head_dim, kind.kv_heads):
        raise DataError(f"{model.path}: layer {layer} finds no keys and values of its kind in a layer before it")
    return msgspec.structs.replace(lender, borrows=True)


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
