"""Rounds float32 weights and encodes them as the records of a bundle: rows, groups and neurons.

If the source itself is on a grid of blocks of 32, the grid is taken over. Then nothing is lost but the rounding of
its scales and centres to codes. If not, a few ranges are tried for each block, and that of least squared error is
taken.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import Mxfp4Rows, PlainRows, QuantRows, TernaryRows
from flashd.bundle.rows import mxfp4
from flashd.bundle.rows.bits import centre_digits, pack_bits
from flashd.bundle.rows.formats import GroupFormat, NeuronFormat, RowFormat
from flashd.bundle.rows.kinds import (
    BITS,
    BLOCK,
    CENTRE_BITS,
    CODE_TYPES,
    Bytes,
    Codes,
    Floats,
    RowKind,
    largest_centre,
)
from flashd.pack.open_model import Grid

SHRINK: dict[RowKind, tuple[float, ...]] = {
    "int4": (1.0, 0.95, 0.9, 0.84), "int8": (1.0,), "int3": (1.0, 0.8), "int2": (0.9, 0.7),
}  # fmt: skip
"""The parts of a block's range that are tried. A smaller part has finer steps but does not reach the extremes."""

FITS: dict[RowKind, int] = {"int4": 1, "int8": 1, "int3": 3, "int2": 3}
"""How many times scale and centre are fitted to the levels that they gave before."""

KEPT = 0.05
"""Steps by which a row's weights may lie off after their grid moved over, as a root mean square. It is what rounding
the grid's codes costs. If they are nearer, no other grid is tried, since that takes most of the time of packing."""

WORTH_A_THREAD = 1 << 17
"""Weights that take longer to round than a thread takes to start."""


def encode_rows(
    weights: Floats, form: RowFormat, grid: Grid | None = None, centred: bool = True, weigh: Floats | None = None
) -> Bytes:
    """Records [n, nbytes] uint8 of rows [n, K] float32; if not `centred`, every centre is zero.

    With `weigh` [1, B, 32], how much a squared error of each weight counts, the source's grid is not looked at.
    For narrow rows of gate and up see `gptq`, for ternary ones `is_ternary`.
    """
    raw = np.zeros((len(weights), form.nbytes), np.uint8)
    count = max(1, min(len(os.sched_getaffinity(0)), len(weights), weights.size // WORTH_A_THREAD))
    ends = [len(weights) * i // count for i in range(count + 1)]
    parts = [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def encode(part: slice) -> None:
        own = None if grid is None else (grid[0][part], grid[1][part])
        _encode(raw[part], weights[part], form, own, centred, weigh)

    if count == 1:
        encode(parts[0])
    else:  # no row depends on another, and numpy lets other threads go on
        with ThreadPoolExecutor(count, thread_name_prefix="rows") as pool:
            list(pool.map(encode, parts))
    return raw


def _encode(
    raw: Bytes, weights: Floats, form: RowFormat, grid: Grid | None, centred: bool, weigh: Floats | None
) -> None:
    """Puts the records of rows where they belong. For the arguments see encode_rows."""
    parts = form.views(raw)
    if isinstance(parts, PlainRows):
        parts.w[:] = weights
    elif isinstance(parts, TernaryRows):
        scale = np.abs(weights).max(1, keepdims=True)
        parts.q[:], parts.scale[:] = pack_bits((np.sign(weights) + 2).astype(np.uint8), 2), scale
    elif isinstance(parts, Mxfp4Rows):
        codes, parts.exponent[:] = mxfp4.coded(weights)
        parts.q[:] = pack_bits(codes, 4)
    else:
        write(parts, quantise(weights.reshape(len(weights), -1, BLOCK), form.kind, grid, centred, weigh), form)


def write(to: QuantRows, coded: Coded, form: RowFormat) -> None:
    """Puts n rows where they belong."""
    to.q[:, : form.weight_bytes] = pack_bits(coded.q.reshape(len(coded.q), -1), form.bits)
    bits = CENTRE_BITS[form.kind]
    to.q[:, form.weight_bytes :] = pack_bits(centre_digits(coded.centre, form.digits // 2, bits), bits)
    to.scale[:], to.step[:] = coded.scale, coded.step


def encode_groups(
    inputs: list[Bytes], down: Floats, bias: Floats, norm: Floats, form: GroupFormat, grid: Grid | None,
    weigh: Floats | None = None,
) -> Bytes:  # fmt: skip
    """Records [g, nbytes] uint8 of g groups of N neurons.

    Args:
        inputs: for each input matrix (gate, up) the records [g N, row bytes] of its rows.
        down: the same neurons' columns of down_proj, [H, g N] float32.
        bias: the biases of the input rows, [g N, M] or [g N, 0] float32.
        norm: the weights of the norm of activations, [g N] or [0] float32.
        grid: the source's own grid of `down`, each part [H, g N / 32].
        weigh: of narrow groups, how much a squared error of each neuron's column counts, [g N].
    """
    n, column = form.neurons, form.column
    raw = np.zeros((down.shape[1] // n, form.nbytes), np.uint8)
    for g, record in enumerate(raw):
        part, blocks = slice(g * n, (g + 1) * n), slice(g * column.blocks, (g + 1) * column.blocks)
        to = form.views(record[None])
        to.inputs[0].take(form.row.views(np.concatenate([records[part] for records in inputs])))
        own = None if grid is None else (grid[0][:, blocks], grid[1][:, blocks])
        counts = None if weigh is None else weigh[part].reshape(1, -1, BLOCK)
        rows = encode_rows(np.ascontiguousarray(down[:, part]), column, own, weigh=counts)
        to.down[0].take(column.views(rows))
        to.bias[:], to.norm[:] = bias[part].T.reshape(1, -1), norm[part]
    return raw


def is_ternary(rows: Floats) -> bool:
    """Whether each of the rows [n, K] has only one magnitude other than zero."""
    size = np.abs(rows)
    return bool(((size == 0) | (size == size.max(1, keepdims=True))).all())


def encode_neurons(inputs: list[Bytes], down: Floats, bias: Floats, form: NeuronFormat) -> Bytes:
    """The records [n, nbytes] uint8 of n neurons.

    Args:
        inputs: for each input matrix (gate, up) the records [n, row bytes] of its rows.
        down: the same neurons' columns of down_proj, [H, n] float32.
        bias: the biases of the input rows, [n, M] or [n, 0] float32.
        form: the format of the neurons.
    """
    rows = [*inputs, encode_rows(np.ascontiguousarray(down.T), form.row)]
    return np.concatenate([*rows, np.ascontiguousarray(bias).view(np.uint8).reshape(len(bias), -1)], axis=1)


def quantise(
    blocks: Floats, kind: RowKind, grid: Grid | None = None, centred: bool = True, weigh: Floats | None = None
) -> Coded:
    """Blocks [n, B, 32] float32 as they are written.

    The B blocks of each of the n share their steps. If `weigh` is given, which broadcasts to the blocks, the source's
    grid is ignored.
    """
    if grid is None or weigh is not None or not (centred or not grid[1].any()):
        return coded(blocks, *fitted(blocks, kind, centred, weigh), kind)
    theirs = coded(blocks, *grid, kind)
    far = np.flatnonzero(theirs.error > KEPT**2 * BLOCK * (grid[0] ** 2).sum(1))  # [m]
    if len(far):
        own = coded(blocks[far], *fitted(blocks[far], kind, centred, None), kind)
        # the grid's own error comes from rounding its codes: a slightly smaller error is not nearer to the source
        better = own.error < theirs.error[far] / 4
        for to, values in zip(theirs.arrays(), own.arrays(), strict=True):
            to[far[better]] = values[better]
    return theirs


def fitted(blocks: Floats, kind: RowKind, centred: bool, weigh: Floats | None) -> Grid:
    """(scales, centres) of blocks [n, B, 32], [n, B] each: for each block the range of SHRINK that errs least."""
    low, high = blocks.min(2), blocks.max(2)  # [n, B] each
    if not centred:
        high = np.maximum(high, -low)
        low = -high
    middle, half = (low + high) / 2, (high - low) / 2
    most = (1 << BITS[kind]) - 1
    scale, centre, least = np.empty_like(low), np.empty_like(low), np.full_like(low, np.inf)
    for part in SHRINK[kind]:
        step = 2 * half * np.float32(part / most)
        tried = step, middle + step / 2
        for _ in range(FITS[kind]):
            tried = _refit(blocks, *tried, kind, centred, weigh)
        off = levels(blocks, *tried, kind) * tried[0][:, :, None] + tried[1][:, :, None] - blocks  # [n, B, 32]
        error = (off * off if weigh is None else off * off * weigh).sum(2)  # [n, B]
        better = error < least
        for to, values in zip((scale, centre, least), (*tried, error), strict=True):
            to[better] = values[better]
    return scale, centre


def _refit(blocks: Floats, scale: Floats, centre: Floats, kind: RowKind, centred: bool, weigh: Floats | None) -> Grid:
    """The (scales, centres) [n, B] of least squared error for the levels that a first pair gives."""
    q = levels(blocks, scale, centre, kind)  # [n, B, 32]
    if not centred:
        return _divide((q * blocks).sum(2), (q * q).sum(2)), np.zeros_like(scale)
    mean, middle = _mean(q, weigh), _mean(blocks, weigh)
    spread = q - mean[:, :, None]
    counted = spread if weigh is None else spread * weigh
    fit = _divide((counted * blocks).sum(2), (counted * spread).sum(2))
    # if weights count very unequally, the fit may be mere rounding noise
    scale = np.where((fit >= 0) & (fit <= 2 * scale), fit, scale)
    return scale, middle - scale * mean


def _mean(blocks: Floats, weigh: Floats | None) -> Floats:
    """The mean of each block, [n, B, 32] -> [n, B]."""
    return blocks.mean(2) if weigh is None else _divide((blocks * weigh).sum(2), weigh.sum(2))


def levels(blocks: Floats, scale: Floats, centre: Floats, kind: RowKind) -> Floats:
    """The nearest levels [n, B, 32] of blocks [n, B, 32]: whole numbers, for 4 bits from -8 to 7."""
    zero = 1 << (BITS[kind] - 1)
    return np.clip(np.rint(_divide(blocks - centre[:, :, None], scale[:, :, None])), -zero, zero - 1)


@dataclass(frozen=True)
class Coded:
    """Blocks as they are written, and their squared errors."""

    q: Bytes  # [n, B, 32]
    scale: Codes  # [n, B]
    centre: Codes  # [n, B]
    step: npt.NDArray[np.float16]  # [n, 2]
    error: Floats  # [n]

    def arrays(self) -> list[npt.NDArray[Any]]:
        """The arrays that are written."""
        return [self.q, self.scale, self.centre, self.step]


def coded(blocks: Floats, scale: Floats, centre: Floats, kind: RowKind) -> Coded:
    """Rounds scales and centres [n, B] to codes, then blocks [n, B, 32] to the levels that these codes give."""
    tops = _half(scale.max(1, keepdims=True)), _half(np.abs(centre).max(1, keepdims=True))
    most = largest_centre(kind)
    scale_codes, s = _code(scale, tops[0], CODE_TYPES[kind], 1, int(np.iinfo(CODE_TYPES[kind]).max))
    centre_codes, c = _code(centre, tops[1], np.int32, -most, most)
    whole = levels(blocks, s, c, kind)
    error = ((whole * s[:, :, None] + c[:, :, None] - blocks) ** 2).sum((1, 2))
    q = (whole + (1 << (BITS[kind] - 1))).astype(np.uint8)
    return Coded(q, scale_codes, centre_codes, np.concatenate(tops, 1).astype(np.float16), error)


def _code(values: Floats, top: Floats, dtype: type[np.integer[Any]], least: int, most: int) -> tuple[Codes, Floats]:
    """Values [n, B] as codes in parts of top [n, 1], and what the codes stand for, [n, B]."""
    codes = np.clip(np.rint(_divide(values, top) * np.float32(most)), least, most).astype(dtype)
    return codes, codes.astype(np.float32) * (top / np.float32(most))


def _half(values: Floats) -> Floats:
    """Values as float16 can hold them."""
    return values.astype(np.float16).astype(np.float32)


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 for b = 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)
