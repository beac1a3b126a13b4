"""The rotary tables of a model: how far each pair of a head turns by a position, and how long it becomes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from flashd.errors import DataError
from flashd.pack.families.attention import head_dim
from flashd.pack.families.family import Family
from flashd.pack.open_model import OpenModel


def rope_tables(model: OpenModel, family: Family) -> npt.NDArray[np.float32]:
    """[tables, 2, D / 2] float32: for each pair of a head the angle of one position, and the length it gets.

    Raises DataError for a way of scaling that is not known.
    """
    if not family.rotary:
        return np.zeros((0, 2, head_dim(model) // 2), np.float32)
    bases = [model.number("rope.freq_base", float, 10000.0)]
    if family.local_base:
        bases.append(model.number("rope.freq_base_swa", float, family.local_base))
    tables = np.zeros((len(bases), 2, head_dim(model) // 2), np.float64)
    tables[:, 1] = 1
    half = rotary_width(model) // 2
    for table, base in zip(tables, bases, strict=True):
        table[0, :half] = base ** (-np.arange(half) / half)
    _scale_rope(model, tables[0], half, bases[0])
    return tables.astype(np.float32)


def rotary_width(model: OpenModel) -> int:
    """How many of a head's dimensions are turned."""
    whole = head_dim(model)
    width = model.number("rope.dimension_count", int, whole)
    if not 2 <= width <= whole:
        raise DataError(f"{model.path}: {width} of a head's {whole} dimensions cannot be turned")
    return width


def _scale_rope(model: OpenModel, table: npt.NDArray[np.float64], half: int, base: float) -> None:
    """Stretches a table for contexts longer than those of the first training."""
    if "rope_freqs.weight" in model.names:  # Llama 3: a divisor for each pair
        table[0, :half] /= model.tensor("rope_freqs.weight").rows()
    kind = model.metadata(f"{model.architecture}.rope.scaling.type")
    if kind in (None, "none"):
        return
    factor = model.number("rope.scaling.factor", float)
    if kind == "linear":
        table[0] /= factor
    elif kind == "yarn":
        table[0, :half] *= _yarn(model, half, base, factor)
        table[1, :half] = model.number("rope.scaling.attn_factor", float, 0.0) or 0.1 * math.log(factor) + 1
    else:
        raise DataError(f"{model.path}: rotary scaling of kind {kind!r} is not supported; known are linear, yarn")


def _yarn(model: OpenModel, half: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What each pair's angle is multiplied by (arXiv 2309.00071): 1 for the fastest, 1 / factor for the slowest."""
    trained = model.number("rope.scaling.original_context_length", int)

    def pair_of(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(base)

    fast = model.number("rope.scaling.yarn_beta_fast", float, 32.0)
    slow = model.number("rope.scaling.yarn_beta_slow", float, 1.0)
    low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), 2 * half - 1)
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
