"""float32 weights -> the rows and groups of bundle.rows.

Where the source is itself on a grid of blocks of 32 the grid moves over and nothing is lost but what codes of
its scales cost; elsewhere the least squared error over a few ranges is taken, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.bits import pack_bits
from flashd.bundle.formats import GroupFormat, NeuronFormat, RowFormat
from flashd.bundle.row_kinds import BITS, BLOCK, CODE_TYPES, Bytes, Codes, Floats, RowKind
from flashd.bundle.slots import PlainRows, TernaryRows
from flashd.pack.open_model import Grid

SHRINK: dict[RowKind, tuple[float, ...]] = {
    "int4": (1.0, 0.95, 0.9, 0.84), "int8": (1.0,), "int3": (1.0, 0.8), "int2": (0.9, 0.7),
}  # fmt: skip
"""Parts of a block's range that are tried: fewer extremes reached, finer steps for the rest."""

FITS: dict[RowKind, int] = {"int4": 1, "int8": 1, "int3": 3, "int2": 3}
"""Times that steps are fitted to the levels that they gave."""


def encode_rows(weights: Floats, form: RowFormat, grid: Grid | None = None, centred: bool = True) -> Bytes:
    """Records [n, nbytes] uint8 of rows [n, K] float32; if not `centred`, every centre is zero.

    For narrow rows see `feedback`, for ternary ones `is_ternary`.
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
    """Records [g, nbytes] uint8 of g groups.

    Args:
        inputs: for each input matrix (gate, up) the records [32 g, row bytes] of its rows.
        down: the same neurons' columns of down_proj, [H, 32 g] float32.
        bias: the biases of the input rows, [32 g, M] or [32 g, 0] float32.
        grid: the source's own grid of `down`, each part [H, g].
        weigh: of narrow groups, how much a squared error of each neuron's column counts, [32 g].
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
    # 32 outputs share a step: [g, H/32, 32 outputs, 32 neurons]
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
    """Whether each of rows [n, K] has but one magnitude beside zero."""
    size = np.abs(rows)
    return bool(((size == 0) | (size == size.max(1, keepdims=True))).all())


def encode_neurons(inputs: list[Bytes], down: Floats, bias: Floats, form: NeuronFormat) -> Bytes:
    """Records [n, nbytes] uint8 of n neurons.

    Args:
        inputs: for each input matrix (gate, up) the records [n, row bytes] of its rows.
        down: the same neurons' columns of down_proj, [H, n] float32.
        bias: the biases of the input rows, [n, M] or [n, 0] float32.
    """
    rows = [*inputs, encode_rows(np.ascontiguousarray(down.T), form.row)]
    return np.concatenate([*rows, np.ascontiguousarray(bias).view(np.uint8).reshape(len(bias), -1)], axis=1)


def quantise(
    blocks: Floats, kind: RowKind, grid: Grid | None = None, centred: bool = True, weigh: Floats | None = None
) -> tuple[Bytes, Codes, Codes, npt.NDArray[np.float16]]:
    """Blocks [n, B, 32] float32 -> q [n, B, 32] uint8, scale codes [n, B], centre codes [n, B], steps [n, 2].

    The B blocks of an n share their steps. With `weigh`, as large as the blocks or repeated over them, the source's
    grid is not looked at.
    """
    own = coded(blocks, *fitted(blocks, kind, centred, weigh), kind)
    if grid is None or weigh is not None or not (centred or not grid[1].any()):
        return own.q, own.scale, own.centre, own.step
    theirs = coded(blocks, *grid, kind)
    # where the grid's own error is but its codes' rounding, another is no nearer to what was meant
    better = own.error < theirs.error / 4
    for to, values in zip(theirs.arrays(), own.arrays(), strict=True):
        to[better] = values[better]
    return theirs.q, theirs.scale, theirs.centre, theirs.step


def fitted(blocks: Floats, kind: RowKind, centred: bool, weigh: Floats | None) -> Grid:
    """Scales and centres [n, B]: for each block the range of SHRINK whose levels, fitted to the block, err least."""
    low, high = blocks.min(2), blocks.max(2)
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
        off = levels(blocks, *tried, kind) * tried[0][:, :, None] + tried[1][:, :, None] - blocks
        error = (off * off if weigh is None else off * off * weigh).sum(2)
        better = error < least
        for to, values in zip((scale, centre, least), (*tried, error), strict=True):
            to[better] = values[better]
    return scale, centre


def _refit(blocks: Floats, scale: Floats, centre: Floats, kind: RowKind, centred: bool, weigh: Floats | None) -> Grid:
    """The scale and the centre of least squared error for the levels that a first pair gives."""
    q = levels(blocks, scale, centre, kind)
    if not centred:
        return _divide((q * blocks).sum(2), (q * q).sum(2)), np.zeros_like(scale)
    mean, middle = _mean(q, weigh), _mean(blocks, weigh)
    spread = q - mean[:, :, None]
    counted = spread if weigh is None else spread * weigh
    fit = _divide((counted * blocks).sum(2), (counted * spread).sum(2))
    # weights that count very unequally leave no more than rounding noise
    scale = np.where((fit >= 0) & (fit <= 2 * scale), fit, scale)
    return scale, middle - scale * mean


def _mean(blocks: Floats, weigh: Floats | None) -> Floats:
    return blocks.mean(2) if weigh is None else _divide((blocks * weigh).sum(2), weigh.sum(2))


def levels(blocks: Floats, scale: Floats, centre: Floats, kind: RowKind) -> Floats:
    """The nearest levels [n, B, 32] of weights, zero in the middle, as many as the bits give."""
    zero = 1 << (BITS[kind] - 1)
    return np.clip(np.rint(_divide(blocks - centre[:, :, None], scale[:, :, None])), -zero, zero - 1)


@dataclass(frozen=True)
class Coded:
    """Blocks as they are written, and the squared error [n] of each n's."""

    q: Bytes
    scale: Codes
    centre: Codes
    step: npt.NDArray[np.float16]
    error: Floats

    def arrays(self) -> list[npt.NDArray[Any]]:
        return [self.q, self.scale, self.centre, self.step]


def coded(blocks: Floats, scale: Floats, centre: Floats, kind: RowKind) -> Coded:
    tops = _half(scale.max(1, keepdims=True)), _half(np.abs(centre).max(1, keepdims=True))
    scale_type, centre_type = CODE_TYPES[kind]
    scale_codes, s = _code(scale, tops[0], scale_type, 1)
    centre_codes, c = _code(centre, tops[1], centre_type, -np.iinfo(centre_type).max)
    whole = levels(blocks, s, c, kind)
    error = ((whole * s[:, :, None] + c[:, :, None] - blocks) ** 2).sum((1, 2))
    q = (whole + (1 << (BITS[kind] - 1))).astype(np.uint8)
    return Coded(q, scale_codes, centre_codes, np.concatenate(tops, 1).astype(np.float16), error)


def _code(values: Floats, top: Floats, dtype: type[np.integer[Any]], least: int) -> tuple[Codes, Floats]:
    """Values [n, B] as codes in parts of top [n, 1], and what the codes stand for, [n, B]."""
    most = int(np.iinfo(dtype).max)
    codes = np.clip(np.rint(_divide(values, top) * np.float32(most)), least, most).astype(dtype)
    return codes, codes.astype(np.float32) * (top / np.float32(most))


def _half(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _divide(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)
