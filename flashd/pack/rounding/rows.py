"""Rounds float32 weights and encodes them as the records of a bundle: rows, groups and neurons.

If the source itself is on a grid of blocks of 32, the grid is taken over. Then nothing is lost but the rounding of
its scales and centres to codes. If not, a few ranges are tried for each block, and that of least squared error is
taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import PlainRows, TernaryRows
from flashd.bundle.bits import pack_bits
from flashd.bundle.formats import GroupFormat, NeuronFormat, RowFormat
from flashd.bundle.row_kinds import BITS, BLOCK, CODE_TYPES, Bytes, Codes, Floats, RowKind
from flashd.pack.sources.source import Grid

SHRINK: dict[RowKind, tuple[float, ...]] = {
    "int4": (1.0, 0.95, 0.9, 0.84), "int8": (1.0,), "int3": (1.0, 0.8), "int2": (0.9, 0.7),
}  # fmt: skip
"""The parts of a block's range that are tried. A smaller part has finer steps but does not reach the extremes."""

FITS: dict[RowKind, int] = {"int4": 1, "int8": 1, "int3": 3, "int2": 3}
"""How many times scale and centre are fitted to the levels that they gave before."""


def encode_rows(weights: Floats, form: RowFormat, grid: Grid | None = None, centred: bool = True) -> Bytes:
    """The records [n, nbytes] uint8 of rows [n, K] float32. If not `centred`, every centre is zero.

    Rows of 3 or 2 bits are encoded by gptq.encode_fed. Weights of ternary rows must be ternary, see `is_ternary`.
    """
    raw = np.zeros((len(weights), form.nbytes), np.uint8)
    parts = form.views(raw)
    if isinstance(parts, PlainRows):
        parts.w[:] = weights
        return raw
    if isinstance(parts, TernaryRows):
        scale = np.abs(weights).max(1, keepdims=True)
        parts.q[:], parts.scale[:] = pack_bits((np.sign(weights) + 2).astype(np.uint8), 2), scale
        return raw
    q, scale, centre, step = quantise(weights.reshape(len(weights), -1, BLOCK), form.kind, grid, centred)
    parts.q[:] = pack_bits(q.reshape(len(weights), -1), form.bits)
    parts.scale[:], parts.centre[:], parts.step[:] = scale, centre, step
    return raw


def encode_groups(
    inputs: list[Bytes], down: Floats, bias: Floats, form: GroupFormat, grid: Grid | None, weigh: Floats | None = None
) -> Bytes:
    """The records [g, nbytes] uint8 of g groups.

    Args:
        inputs: for each input matrix (gate, up) the records [32 g, row bytes] of its rows.
        down: the same neurons' columns of down_proj, [H, 32 g] float32.
        bias: the biases of the input rows, [32 g, M] or [32 g, 0] float32.
        form: the format of the groups.
        grid: the source's own grid of `down`, scales and centres [H, g]; None if it has none.
        weigh: how much a squared error of each neuron's column counts, [32 g]; None: all count alike.
    """
    groups, h = down.shape[1] // BLOCK, form.hidden
    raw = np.zeros((groups, form.nbytes), np.uint8)
    raw[:, form.nbytes - 4 * BLOCK * form.biases :] = np.ascontiguousarray(bias).view(np.uint8).reshape(groups, -1)
    body = raw[:, : BLOCK * form.bundle_bytes].reshape(groups, BLOCK, form.bundle_bytes)
    for i, records in enumerate(inputs):
        body[:, :, i * form.row.nbytes : (i + 1) * form.row.nbytes] = records.reshape(groups, BLOCK, -1)
    column = body[:, :, len(inputs) * form.row.nbytes :]
    if form.kind in ("f16", "ternary"):
        column[:] = encode_rows(np.ascontiguousarray(down.T), form.row).reshape(groups, BLOCK, -1)
        return raw
    # 32 outputs share a step: [g * H / 32, 32 outputs, 32 neurons]
    blocks = down.reshape(h // BLOCK, BLOCK, groups, BLOCK).transpose(2, 0, 1, 3).reshape(-1, BLOCK, BLOCK)
    if grid is not None:
        grid = (grid[0].T.reshape(-1, BLOCK), grid[1].T.reshape(-1, BLOCK))
    counts = None if weigh is None else np.repeat(weigh.reshape(groups, 1, BLOCK), h // BLOCK, axis=0)
    q, scale, centre, step = quantise(blocks, form.kind, grid, weigh=counts)
    neuron_major = q.reshape(groups, h, BLOCK).transpose(0, 2, 1)  # [g, 32, H]
    column[:] = pack_bits(np.ascontiguousarray(neuron_major), form.row.bits)
    tail = raw[:, BLOCK * form.bundle_bytes : form.nbytes - 4 * BLOCK * form.biases]
    steps = step.reshape(groups, h // BLOCK, 2).transpose(0, 2, 1)  # [g, 2, H/32]
    shared = [scale.reshape(groups, h), centre.reshape(groups, h), steps.reshape(groups, -1)]
    tail[:] = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in shared], 1)
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
) -> tuple[Bytes, Codes, Codes, npt.NDArray[np.float16]]:
    """Blocks [n, B, 32] float32 -> (q [n, B, 32] uint8, scale codes [n, B], centre codes [n, B], steps [n, 2]).

    The B blocks of each of the n share their steps. If `weigh` is given, which broadcasts to the blocks, the source's
    grid is ignored.
    """
    own = coded(blocks, *fitted(blocks, kind, centred, weigh), kind)
    if grid is None or weigh is not None or not (centred or not grid[1].any()):
        return own.q, own.scale, own.centre, own.step
    theirs = coded(blocks, *grid, kind)
    # the grid's own error comes from rounding its codes: a slightly smaller error is not nearer to the source
    better = own.error < theirs.error / 4
    for to, values in zip(theirs.arrays(), own.arrays(), strict=True):
        to[better] = values[better]
    return theirs.q, theirs.scale, theirs.centre, theirs.step


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
    scale_type, centre_type = CODE_TYPES[kind]
    scale_codes, s = _code(scale, tops[0], scale_type, 1)
    centre_codes, c = _code(centre, tops[1], centre_type, -np.iinfo(centre_type).max)
    whole = levels(blocks, s, c, kind)
    error = ((whole * s[:, :, None] + c[:, :, None] - blocks) ** 2).sum((1, 2))
    q = (whole + (1 << (BITS[kind] - 1))).astype(np.uint8)
    return Coded(q, scale_codes, centre_codes, np.concatenate(tops, 1).astype(np.float16), error)


def _code(values: Floats, top: Floats, dtype: type[np.integer[Any]], least: int) -> tuple[Codes, Floats]:
    """(values [n, B] as codes in parts of top [n, 1], the values that the codes stand for [n, B])."""
    most = int(np.iinfo(dtype).max)
    codes = np.clip(np.rint(_divide(values, top) * np.float32(most)), least, most).astype(dtype)
    return codes, codes.astype(np.float32) * (top / np.float32(most))


def _half(values: Floats) -> Floats:
    """Values as float16 can hold them."""
    return values.astype(np.float16).astype(np.float32)


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 for b = 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)
