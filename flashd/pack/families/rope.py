"""The rotary tables of a model: how far each pair of a head turns by a position, and how long it becomes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from flashd.errors import DataError
from flashd.pack.families.attention import has_local_rope, head_dim, local_head_dim, turned_of_latent
from flashd.pack.families.family import Family
from flashd.pack.open_model import OpenModel

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""LongRoPE's divisors (arXiv 2402.13753): of texts that may be longer than those of the first training; of others."""


def context_of(model: OpenModel, asked: int | None) -> int:
    """How many tokens a text may have.

    If the model turns long texts in another way than short ones, short ones are taken unless `asked` is more.
    Raises DataError for more than the model was trained for, or than is supported.
    """
    most = model.number("context_length", int)
    if most < 1:
        raise DataError(f"{model.path}: a context of {most} tokens makes no model")
    if asked is not None and not 1 <= asked <= most:
        raise DataError(f"{model.path}: texts of {asked} tokens (--context); the model was trained for 1 to {most}")
    short = min(most, _first_context(model))
    tempered = bool(model.number("attention.temperature_scale", float, 0.0))
    if tempered and asked is not None and asked > short:
        raise DataError(
            f"{model.path}: texts of {asked} tokens (--context); queries behind token {short} have a temperature"
            f" ({model.architecture}.attention.temperature_scale), which is not supported"
        )
    return asked or (short if tempered or SHORT in model.names else most)


def _first_context(model: OpenModel) -> int:
    """The tokens of texts in the first training. Raises DataError if there are none."""
    first = model.number("rope.scaling.original_context_length", int, model.number("context_length", int))
    if first < 1:
        raise DataError(f"{model.path}: a first training on texts of {first} tokens makes no model")
    return first


def rope_tables(model: OpenModel, family: Family, context: int | None = None) -> list[npt.NDArray[np.float32]]:
    """Of each table [2, D / 2] float32: for each pair of a head the angle of one position, and the length it gets.

    Of texts of up to `context` tokens, see context_of. Raises DataError for a way of scaling that is not known.
    """
    if not family.rotary:
        return []
    bases, widths = [model.number("rope.freq_base", float, 10000.0)], [_turned(model, family)]
    if has_local_rope(model, family):
        bases.append(model.number("rope.freq_base_swa", float, family.local_base or bases[0]))
        widths.append(local_head_dim(model, family))
    tables = []
    for base, width in zip(bases, widths, strict=True):
        half = (rotary_width(model) if width == widths[0] else width) // 2
        table = np.zeros((2, width // 2), np.float64)
        table[1] = 1
        table[0, :half] = base ** (-np.arange(half) / half)
        tables.append(table)
    half = rotary_width(model) // 2
    _divide(model, tables[0][0, :half], context_of(model, context))
    _scale_rope(model, family, tables[0], half, bases[0])
    return [table.astype(np.float32) for table in tables]


def rotary_width(model: OpenModel) -> int:
    """How many of a head's dimensions are turned."""
    whole = head_dim(model)
    width = model.number("rope.dimension_count", int, whole)
    if not 2 <= width <= whole:
        raise DataError(f"{model.path}: {width} of a head's {whole} dimensions cannot be turned")
    return width


def _divide(model: OpenModel, angles: npt.NDArray[np.float64], context: int) -> None:
    """Divides the angles of pairs, in place, by the file's own divisors: Llama 3's, or LongRoPE's."""
    if (LONG in model.names) != (SHORT in model.names):
        raise DataError(f"{model.path}: of {LONG} and {SHORT} one is missing")
    factors = LONG if context > _first_context(model) else SHORT
    for name in {"rope_freqs.weight", factors} & model.names:
        divisors = model.tensor(name).rows()
        if not (np.isfinite(divisors).all() and (divisors > 0).all()):
            raise DataError(f"{model.path}: {name} has divisors that are not positive numbers")
        if divisors.shape != angles.shape:
            raise DataError(f"{model.path}: {name} has {divisors.size} divisors for {angles.size} pairs")
        angles /= divisors


KINDS = ("none", "linear", "longrope", "yarn")
"""The kinds of rotary scaling."""


def unknown_scaling(model: OpenModel) -> list[str]:
    """What a model says of its rotary scaling that flashd does not know, in words."""
    if (kind := _kind(model)) not in KINDS:
        return [f"rotary scaling of kind {kind!r} is not supported; known are {', '.join(KINDS[1:])}"]
    keys = ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor") if kind == "yarn" else ()
    values = {f"{model.architecture}.{key}": model.number(key, float, 1.0) for key in keys}
    return [f"{key} is {value}; flashd supports only 1" for key, value in values.items() if value != 1.0]


def _factor(model: OpenModel) -> float:
    return model.number("rope.scaling.factor", float, 0.0) or model.number("rope.scale_linear", float, 0.0)


def _kind(model: OpenModel) -> str:
    # llama.cpp, too, takes a factor without a kind for a linear one
    return str(model.metadata(f"{model.architecture}.rope.scaling.type") or ("linear" if _factor(model) else "none"))


def _scale_rope(model: OpenModel, family: Family, table: npt.NDArray[np.float64], half: int, base: float) -> None:
    """Stretches a table for contexts longer than those of the first training."""
    # the length that a file states multiplies the usual one
    table[1, :half] = model.number("rope.scaling.attn_factor", float, 1.0)
    factor, kind = _factor(model), _kind(model)
    if kind == "longrope" and SHORT not in model.names:
        raise DataError(f"{model.path}: rotary scaling of kind 'longrope' without its divisors ({SHORT})")
    if kind in ("none", "longrope"):
        return
    if not 0 < factor < math.inf:
        raise DataError(f"{model.path}: a rotary scaling of kind {kind!r} by a factor of {factor}")
    if kind == "linear":
        table[0] /= factor
        return
    table[0, :half] *= _yarn(model, family, half, base, factor)
    log_multiplier = model.number("rope.scaling.yarn_log_multiplier", float, 0.0)
    if not (family.latent and log_multiplier):  # these scale the products of queries and keys, see latent_scale
        table[1, :half] *= yarn_length(factor) / yarn_length(factor, log_multiplier)


def latent_scale(model: OpenModel) -> float:
    """By how much YaRN multiplies the products of queries and keys (DeepSeek-V2).

    GGUF has a tenth of config.json's mscale_all_dim, and takes mscale to be the same.
    """
    log_multiplier = model.number("rope.scaling.yarn_log_multiplier", float, 0.0)
    return yarn_length(model.number("rope.scaling.factor", float, 0.0), 10 * log_multiplier) ** 2


def _turned(model: OpenModel, family: Family) -> int:
    """The width that a rotary table has angles for."""
    return turned_of_latent(model) if family.latent else head_dim(model)


def yarn_length(factor: float, scale: float = 1.0) -> float:
    """How long YaRN makes queries and keys that it stretches by a factor (arXiv 2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _yarn(model: OpenModel, family: Family, half: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What each pair's angle is multiplied by (arXiv 2309.00071): 1 for the fastest, 1 / factor for the slowest."""
    trained = _first_context(model)

    def pair_of(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(base)

    fast = model.number("rope.scaling.yarn_beta_fast", float, 32.0)
    slow = model.number("rope.scaling.yarn_beta_slow", float, 1.0)
    low, high = pair_of(fast), pair_of(slow)
    truncated = model.metadata(f"{model.architecture}.rope.scaling.yarn_truncate")
    if family.yarn_truncated if truncated is None else truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    slowed = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    return np.asarray(1 - slowed + slowed / factor)


def rotary_order(family: Family, heads: int, head_dim: int, rotary: int) -> npt.NDArray[np.int64]:
    """For each row of q or k as the engine wants it, the row of the file that holds it.

    The engine turns dimension i with i + D / 2; of a head that is turned in part, the rest is put between.
    """
    pairs = np.arange(rotary).reshape(-1, 2).T if family.permuted else np.arange(rotary).reshape(2, -1)
    rest = np.arange(rotary, head_dim).reshape(2, -1)
    head = np.concatenate([pairs, rest], axis=1).reshape(-1)
    return np.asarray(np.arange(heads)[:, None] * head_dim + head).reshape(-1)
