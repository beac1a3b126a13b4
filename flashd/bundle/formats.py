"""The formats of records: how rows, groups and neurons lie on the card, and views of them without a copy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from flashd.bundle.arrays import (
    ColumnSteps,
    Groups,
    PairedNeurons,
    PlainGroups,
    PlainNeurons,
    PlainRows,
    QuantGroups,
    QuantNeurons,
    QuantRows,
    Rows,
    TernaryGroups,
    TernaryRows,
)
from flashd.bundle.bits import as_nibbles
from flashd.bundle.row_kinds import BITS, BLOCK, CODE_TYPES, NARROW, Bytes, Floats, RowKind


def _carve(raw: Bytes, widths: list[tuple[Any, tuple[int, ...]]]) -> list[Any]:
    """Views of the consecutive parts of records. raw: [..., record bytes]; widths: (dtype, shape) of each part."""
    parts, at = [], 0
    for dtype, shape in widths:
        size = prod(shape) * np.dtype(dtype).itemsize
        part = raw[..., at : at + size].view(dtype)
        parts.append(part.reshape(*raw.shape[:-1], *shape))
        at += size
    return parts


@dataclass(frozen=True)
class RowFormat:
    """The format of rows, a record each.

    Quantised: [q | scale codes | centre codes | two float16 steps]. f16: the weights. ternary: [q | a float32 scale].
    Raises ValueError for a kind or a width that does not exist.
    """

    kind: RowKind
    width: int  # K, weights of a row

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise ValueError(f"rows of kind {self.kind!r}; known are {', '.join(BITS)}")
        if self.width <= 0 or self.width % BLOCK:
            raise ValueError(f"rows of {self.width} weights; the width must be a multiple of {BLOCK}")

    @property
    def bits(self) -> int:
        return BITS[self.kind]

    @property
    def blocks(self) -> int:
        return self.width // BLOCK

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one record."""
        weights = self.width * self.bits // 8
        match self.kind:
            case "f16":
                return weights
            case "ternary":
                return weights + 4
        return weights + 2 * self.blocks * self.code_bytes + 4

    @property
    def code_bytes(self) -> int:
        """Bytes of one scale code, and of one centre code."""
        return np.dtype(CODE_TYPES[self.kind][0]).itemsize

    def empty(self, rows: int) -> Rows:
        """Arrays for `rows` rows, their memory not touched yet."""
        if self.kind == "f16":
            return PlainRows(np.empty((rows, self.width), np.float16))
        if self.kind == "ternary":
            return TernaryRows(np.empty((rows, self.width // 4), np.uint8), np.empty((rows, 1), np.float32))
        scale, centre = CODE_TYPES[self.kind]
        return QuantRows(
            np.empty((rows, self.width * self.bits // 8), np.uint8),
            np.empty((rows, self.blocks), scale),
            np.empty((rows, self.blocks), centre),
            np.empty((rows, 2), np.float16),
        )

    def views(self, raw: Bytes) -> Rows:
        """Records as arrays, in place. raw: [..., nbytes] uint8. The arrays may be unaligned."""
        if self.kind == "f16":
            return PlainRows(*_carve(raw, [(np.float16, (self.width,))]))
        if self.kind == "ternary":
            return TernaryRows(*_carve(raw, [(np.uint8, (self.width // 4,)), (np.float32, (1,))]))
        return QuantRows(
            *_carve(
                raw,
                [
                    (np.uint8, (self.width * self.bits // 8,)),
                    *((code, (self.blocks,)) for code in CODE_TYPES[self.kind]),
                    (np.float16, (2,)),
                ],
            )
        )


@dataclass(frozen=True)
class _BundleFormat:
    """What the formats of groups and of neurons have in common."""

    kind: RowKind
    hidden: int  # H
    inputs: int = 2  # M
    biases: int = 0  # M, or 0 if the inputs have none

    @property
    def row(self) -> RowFormat:
        return RowFormat(self.kind, self.hidden)


@dataclass(frozen=True)
class GroupFormat(_BundleFormat):
    """The format of groups of 32 neurons, a record each.

    Quantised: 32 neurons, each [row of every input matrix (a RowFormat record) | column of down_proj (q only)], then
    what the 32 columns share: [down scale codes | down centre codes | steps]. So a neuron is one contiguous read, and
    so are consecutive groups ("LLM in a flash", section 3.2). If the input rows have biases, these end the record as
    float32 [32, M]. The columns of f16 and ternary groups are RowFormat records too, and share nothing.
    """

    @property
    def column_bytes(self) -> int:
        """Bytes of one neuron's column of down_proj, without what 32 columns share."""
        return self.row.nbytes if self.kind == "ternary" else self.hidden * self.row.bits // 8

    @property
    def bundle_bytes(self) -> int:
        """Bytes of one neuron."""
        return self.inputs * self.row.nbytes + self.column_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes behind the 32 neurons: what their columns share, and biases."""
        shared = 2 * self.hidden * self.row.code_bytes + 4 * self.row.blocks if self.kind in CODE_TYPES else 0
        return shared + 4 * BLOCK * self.biases

    @property
    def nbytes(self) -> int:
        """Bytes of one group."""
        return BLOCK * self.bundle_bytes + self.tail_bytes

    def empty(self, groups: int) -> Groups:
        """Arrays for `groups` groups, their memory not touched yet."""
        h, m, b, width = self.hidden, self.inputs, self.row.blocks, self.column_bytes
        bias = np.empty((groups, BLOCK, self.biases), np.float32)
        if self.kind == "f16":
            plain = np.empty((groups, BLOCK, m, h), np.float16), np.empty((groups, BLOCK, h), np.float16)
            return PlainGroups(*plain, bias)
        if self.kind == "ternary":
            return TernaryGroups(
                np.empty((groups, BLOCK, m, h // 4), np.uint8), np.empty((groups, BLOCK, m, 1), np.float32),
                np.empty((groups, BLOCK, h // 4), np.uint8), np.empty((groups, BLOCK, 1), np.float32), bias,
            )  # fmt: skip
        scale, centre = CODE_TYPES[self.kind]
        return QuantGroups(
            np.empty((groups, BLOCK, m, width), np.uint8),
            np.empty((groups, BLOCK, m, b), scale),
            np.empty((groups, BLOCK, m, b), centre),
            np.empty((groups, BLOCK, m, 2), np.float16),
            np.empty((groups, BLOCK, width), np.uint8),
            np.empty((groups, h), scale),
            np.empty((groups, h), centre),
            np.empty((groups, 2, b), np.float16),
            bias,
        )

    def views(self, raw: Bytes) -> Groups:
        """Records as arrays, in place. raw: [n, nbytes] uint8, C-contiguous."""
        n, m = len(raw), self.inputs
        body = raw[:, : BLOCK * self.bundle_bytes].reshape(n, BLOCK, self.bundle_bytes)  # [n, 32, bundle bytes]
        rows = body[:, :, : m * self.row.nbytes].reshape(n, BLOCK, m, self.row.nbytes)  # [n, 32, M, row bytes]
        column, tail = body[:, :, m * self.row.nbytes :], raw[:, BLOCK * self.bundle_bytes :]
        bias: tuple[Any, tuple[int, ...]] = (np.float32, (BLOCK, self.biases))
        if self.kind == "f16":
            return PlainGroups(rows.view(np.float16), column.view(np.float16), *_carve(tail, [bias]))
        row = self.row.views(rows)
        if isinstance(row, TernaryRows):
            down = self.row.views(column)
            assert isinstance(down, TernaryRows)
            return TernaryGroups(row.q, row.scale, down.q, down.scale, *_carve(tail, [bias]))
        assert isinstance(row, QuantRows)
        shared = _carve(tail, [*self._shared, bias])
        return QuantGroups(row.q, row.scale, row.centre, row.step, column, *shared)

    @property
    def _shared(self) -> list[tuple[Any, tuple[int, ...]]]:
        """(dtype, shape) of each part of what 32 columns share."""
        codes = [(code, (self.hidden,)) for code in CODE_TYPES[self.kind]]
        return [*codes, (np.float16, (2, self.row.blocks))]

    @property
    def step_bytes(self) -> int:
        """Bytes of what the columns of a quantised group share."""
        return self.tail_bytes - 4 * BLOCK * self.biases

    def steps(self, raw: Bytes) -> ColumnSteps:
        """What the columns of n groups share, in place. raw: [n, step_bytes] uint8."""
        return ColumnSteps(*_carve(raw, self._shared))

    def groups(self, raw: Bytes) -> Groups:
        """Records as products take them: in place, or widened to 4 bits if they have 3 or 2. raw: [n, nbytes]."""
        groups = self.views(raw)
        if self.kind not in NARROW:
            return groups
        assert isinstance(groups, QuantGroups)
        bits = self.row.bits
        return replace(groups, q=as_nibbles(groups.q, bits), down=as_nibbles(groups.down, bits))


@dataclass(frozen=True)
class NeuronFormat(_BundleFormat):
    """The format of single neurons, a record each, for models of which few neurons take part in a token.

    [row of every input matrix | column of down_proj | biases]. Rows and column are RowFormat records with blocks of
    their own, so no neuron needs its neighbours. The biases of the input rows are float32 [M], if there are any.
    """

    @cached_property
    def bundle_bytes(self) -> int:
        """Bytes of one neuron."""
        return (self.inputs + 1) * self.row.nbytes + 4 * self.biases

    @property
    def nbytes(self) -> int:
        """Bytes of one unit, which is a neuron."""
        return self.bundle_bytes

    def empty(self, neurons: int) -> QuantNeurons | PlainNeurons:
        """Arrays for `neurons` neurons, their memory not touched yet."""
        rows = self.row.empty(neurons * (self.inputs + 1))
        bias = np.empty((neurons, self.biases), np.float32)
        return self._neurons([a.reshape(neurons, self.inputs + 1, a.shape[1]) for a in rows.arrays()], bias)

    def views(self, raw: Bytes) -> QuantNeurons | PlainNeurons:
        """Records as arrays, in place. raw: [n, nbytes] uint8, C-contiguous."""
        width = (self.inputs + 1) * self.row.nbytes
        rows = self.row.views(raw[:, :width].reshape(len(raw), self.inputs + 1, self.row.nbytes))
        (bias,) = _carve(raw[:, width:], [(np.float32, (self.biases,))])
        return self._neurons(rows.arrays(), bias)

    def _neurons(self, parts: list[Any], bias: Floats) -> QuantNeurons | PlainNeurons:
        if self.kind == "f16":
            (w,) = parts
            return PlainNeurons(w, bias)
        q, scale, centre, step = parts
        return QuantNeurons(q, scale, centre, step, bias)


@dataclass(frozen=True)
class PairFormat(_BundleFormat):
    """The format of single neurons whose gate rows stay in RAM, a record each: [up row | down column (q only)].

    The steps of the columns stay in RAM too. 32 neurons share them, so the weights are the same as in a group.
    """

    @property
    def bundle_bytes(self) -> int:
        """Bytes of one neuron."""
        return self.row.nbytes + self.hidden * self.row.bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes of one unit, which is a neuron."""
        return self.bundle_bytes

    def empty(self, neurons: int) -> PairedNeurons:
        """Arrays for `neurons` neurons, their memory not touched yet."""
        down = np.empty((neurons, self.hidden * self.row.bits // 8), np.uint8)
        parts: list[Any] = [*self.row.empty(neurons).arrays(), down]
        return PairedNeurons(*parts)

    def views(self, raw: Bytes) -> PairedNeurons:
        """Records as arrays, in place. raw: [n, nbytes] uint8."""
        row = self.row.views(raw[:, : self.row.nbytes])
        parts: list[Any] = [*row.arrays(), raw[:, self.row.nbytes :]]
        return PairedNeurons(*parts)
