"""float32 weights -> the rows and groups of bundle.rows.

Where the source is itself on a grid of blocks of 32 the grid moves over and nothing is lost but what codes of
its scales cost; elsewhere the least squared error over a few ranges is taken, block by block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows import (
    BITS,
    BLOCK,
    CODE_TYPES,
    NARROW,
    Bytes,
    Codes,
    Floats,
    GroupFormat,
    NeuronFormat,
    PlainRows,
    RowFormat,
    RowKind,
    TernaryRows,
    pack_bits,
)
from flashd.pack.source import Grid

SHRINK: dict[RowKind, tuple[float, ...]] = {
    "int4": (1.0, 0.95, 0.9, 0.84), "int8": (1.0,), "int3": (1.0, 0.8), "int2": (0.9, 0.7),
}  # fmt: skip
"""Parts of a block's range that are tried: fewer extremes reached, finer steps for the rest."""

FITS = 3
"""Times that a narrow block's scale and centre are fitted to its weights as they were rounded last."""


def encode_rows(
    weights: Floats, form: RowFormat, grid: Grid | None = None, centred: bool = True, weigh: Floats | None = None
) -> Bytes:
    """Records [n, nbytes] uint8 of rows [n, K] float32; if not `centred`, every centre is zero.

    Narrow rows take `weigh` [K], how much an error of each weight counts. For ternary rows see `is_ternary`.
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
    blocks = weights.reshape(len(weights), -1, BLOCK)
    if weigh is not None:
        grid = fitted(blocks, form.kind, weigh.reshape(-1, BLOCK))
    q, scale, centre, step = quantise(blocks, form.kind, grid, centred)
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
        weigh: of narrow groups, how much an error of each neuron's column counts, [32 g].
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
    if weigh is not None:
        grid = fitted(blocks, form.kind, np.repeat(weigh.reshape(groups, 1, BLOCK), h // BLOCK, axis=0))
    elif grid is not None:
        grid = (grid[0].T.reshape(-1, BLOCK), grid[1].T.reshape(-1, BLOCK))
    q, scale, centre, step = quantise(blocks, form.kind, grid)
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


def fitted(blocks: Floats, kind: RowKind, weigh: Floats) -> Grid:
    """Scales and centres [n, B] of blocks [n, B, 32] that lose least, errors weighed by [B, 32] or [n, 1, 32].

    Least squares in turn with rounding, from a few ranges.
    """
    levels = (1 << BITS[kind]) - 1
    low, high = blocks.min(2, keepdims=True), blocks.max(2, keepdims=True)
    weigh = np.broadcast_to(weigh.astype(np.float32), blocks.shape)
    total = weigh.sum(2, keepdims=True)
    best = [np.full_like(low, np.inf), low, low]  # error, scale, least
    for shrink in SHRINK[kind]:
        least = (low + high) / 2 - (high - low) * np.float32(shrink / 2)
        scale = (high - low) * np.float32(shrink / levels)
        for _ in range(FITS):
            q = np.clip(np.rint(_divide(blocks - least, scale)), 0, levels)
            wq = weigh * q
            mean_q, mean = (
                _divide(wq.sum(2, keepdims=True), total),
                _divide((weigh * blocks).sum(2, keepdims=True), total),
            )
            spread = (wq * (q - mean_q)).sum(2, keepdims=True)
            slope = _divide((wq * (blocks - mean)).sum(2, keepdims=True), spread)
            scale = np.where(slope > 0, slope, scale)
            least = mean - scale * mean_q
        error = (weigh * (q * scale + least - blocks) ** 2).sum(2, keepdims=True)
        better = error < best[0]
        best = [np.where(better, new, old) for new, old in zip((error, scale, least), best, strict=True)]
    _, scale, least = (part[:, :, 0] for part in best)
    return scale, least + scale * np.float32(1 << (BITS[kind] - 1))


def quantise(
    blocks: Floats, kind: RowKind, grid: Grid | None = None, centred: bool = True
) -> tuple[Bytes, Codes, Codes, npt.NDArray[np.float16]]:
    """Blocks [n, B, 32] float32 -> q [n, B, 32] uint8, scale codes [n, B], centre codes [n, B], steps [n, 2].

    The B blocks of an n share their steps.
    """
    low, high = blocks.min(2), blocks.max(2)
    if not centred:
        high = np.maximum(high, -low)
        low = -high
    middle, half = (low + high) / 2, (high - low) / 2
    bits = BITS[kind]
    levels = (1 << bits) - 1
    tries = [(2 * half * r / levels, middle + half * r / levels) for r in SHRINK[kind]]
    if grid is not None and kind in NARROW:
        tries = [grid]
    elif grid is not None and (centred or not grid[1].any()):
        tries.insert(0, grid)
    best = _Coded(blocks, *tries[0], kind, bits)
    for scale, centre in tries[1:]:
        best.take_better(_Coded(blocks, scale, centre, kind, bits))
    return best.q, best.scale, best.centre, best.step


class _Coded:
    """One try at coding blocks [n, B, 32], and its squared error a row of blocks."""

    def __init__(self, blocks: Floats, scale: Floats, centre: Floats, kind: RowKind, bits: int) -> None:
        top_scale = _half(scale.max(1, keepdims=True))
        top_centre = _half(np.abs(centre).max(1, keepdims=True))
        self.step = np.concatenate([top_scale, top_centre], 1).astype(np.float16)
        self.scale, s = _code(scale, top_scale, CODE_TYPES[kind][0], 1)
        self.centre, c = _code(centre, top_centre, CODE_TYPES[kind][1], -np.iinfo(CODE_TYPES[kind][1]).max)
        zero = 1 << (bits - 1)
        levels = np.clip(np.rint(_divide(blocks - c, s)), -zero, zero - 1)
        self.error = ((levels * s + c - blocks) ** 2).sum((1, 2))
        self.q = (levels + zero).astype(np.uint8)

    def take_better(self, other: _Coded) -> None:
        better = other.error < self.error
        for name in ("q", "scale", "centre", "step", "error"):
            getattr(self, name)[better] = getattr(other, name)[better]


def _code(values: Floats, top: Floats, dtype: type[np.integer[Any]], least: int) -> tuple[Codes, Floats]:
    """Values [n, B] as codes in parts of top [n, 1], and what the codes stand for, [n, B, 1]."""
    most = int(np.iinfo(dtype).max)
    codes = np.clip(np.rint(_divide(values, top) * np.float32(most)), least, most).astype(dtype)
    return codes, (codes.astype(np.float32) * (top / np.float32(most)))[:, :, None]


def _half(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _divide(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)
