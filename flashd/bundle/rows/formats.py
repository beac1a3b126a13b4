"""How rows, groups of neurons and single neurons are written: the byte layout that packer and engine share.

A *row* is what multiplies one input vector. Quantised rows are cut into blocks of 32 weights; a weight is
`scale * q + centre`, with q an integer around zero, and both steps codes in parts of the row's largest. The centres
are written behind the weights as if they were weights too, in two digits each, all high ones, then all low ones. A
product takes them like the rest if its input is followed by the sums of its blocks, twice.

flashd/bundle/FORMAT.md has the whole file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from flashd.bundle.arrays import (
    Groups,
    Mxfp4Rows,
    PlainNeurons,
    PlainRows,
    QuantNeurons,
    QuantRows,
    Rows,
    TernaryRows,
)
from flashd.bundle.rows.bits import as_nibbles
from flashd.bundle.rows.kinds import BITS, BLOCK, CENTRE_BITS, CODE_TYPES, NARROW, Bytes, RowKind

Plane = tuple[Any, tuple[int, ...]]
"""The dtype and the shape of one array of a record."""


def _carve(raw: Bytes, planes: list[Plane]) -> list[Any]:
    """Views of the consecutive arrays of records. raw: [..., record bytes]."""
    parts, at = [], 0
    for dtype, shape in planes:
        size = prod(shape) * np.dtype(dtype).itemsize
        part = raw[..., at : at + size].view(dtype)
        parts.append(part.reshape(*raw.shape[:-1], *shape))
        at += size
    return parts


def _nbytes(planes: list[Plane]) -> int:
    return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape in planes)


@dataclass(frozen=True)
class RowFormat:
    """Rows of `width` weights: [q, the digits of the centres behind it | scale codes | two float16 steps].

    Of f16 rows it is the weights alone, of ternary rows [q | a float32 scale], of mxfp4 rows [q | B exponents].
    """

    kind: RowKind
    width: int

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

    @property
    def digits(self) -> int:
        """Values behind the weights: the centres' high digits, filled up to whole blocks, then the low ones."""
        return 2 * -(-self.blocks // BLOCK) * BLOCK if self.kind in CODE_TYPES else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of a row's weights, without what stands behind them."""
        return self.width * self.bits // 8

    @property
    def q_bytes(self) -> int:
        return self.weight_bytes + (self.digits * CENTRE_BITS[self.kind] // 8 if self.digits else 0)

    def planes(self, *axes: int) -> list[Plane]:
        """The arrays of rows, with `axes` in front of each."""
        if self.kind == "f16":
            return [(np.float16, (*axes, self.width))]
        if self.kind == "ternary":
            return [(np.uint8, (*axes, self.width // 4)), (np.float32, (*axes, 1))]
        if self.kind == "mxfp4":
            return [(np.uint8, (*axes, self.width // 2)), (np.uint8, (*axes, self.blocks))]
        return [
            (np.uint8, (*axes, self.q_bytes)),
            (CODE_TYPES[self.kind], (*axes, self.blocks)),
            (np.float16, (*axes, 2)),
        ]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return _nbytes(self.planes())

    def rows(self, arrays: list[Any]) -> Rows:
        """The arrays of `planes` by their names."""
        if self.kind == "f16":
            return PlainRows(*arrays)
        kinds: dict[RowKind, type[TernaryRows | Mxfp4Rows]] = {"ternary": TernaryRows, "mxfp4": Mxfp4Rows}
        return kinds.get(self.kind, QuantRows)(*arrays)

    def empty(self, rows: int) -> Rows:
        """Arrays for `rows` rows, their memory not touched yet."""
        return self.rows([np.empty(shape, dtype) for dtype, shape in self.planes(rows)])

    def views(self, raw: Bytes) -> Rows:
        """The parts of records in place. raw: [..., nbytes] uint8, unaligned parts included."""
        return self.rows(_carve(raw, self.planes()))

    @property
    def widened(self) -> RowFormat:
        """The format of what `wide` gives."""
        return RowFormat("int4", self.width) if self.kind in NARROW else self

    def wide(self, rows: Rows) -> Rows:
        """Narrow rows with 4 bits a weight, others as they are."""
        if self.kind not in NARROW:
            return rows
        assert isinstance(rows, QuantRows)
        q = rows.q.swapaxes(-1, -2)
        weights, digits = q[..., : self.weight_bytes, :], q[..., self.weight_bytes :, :]
        q = np.concatenate([as_nibbles(weights, self.bits), digits], axis=-2)
        return QuantRows(q.swapaxes(-1, -2), rows.scale, rows.step)


@dataclass(frozen=True)
class GroupFormat:
    """Groups of `neurons` neurons, a record each: what is read, checked and multiplied as one.

    [rows of gate and up | rows of down_proj | biases of gate and up | weights of the activations' norm], each kind of
    array in one piece: q of all input rows, their scale codes, their steps, and then the same of down_proj's rows
    [H, neurons]. The rows lie side by side: first the first byte of all of them, then the second. Biases and a norm
    are there if the model has them. So a group is one contiguous read (section 3.2 of "LLM in a flash"), and its
    arrays go into a product as they lie in the record.
    """

    kind: RowKind
    hidden: int
    inputs: int = 2  # M
    biases: int = 0  # M or none
    neurons: int = BLOCK  # N
    normed: bool = False  # the model norms activations
    down_kind: RowKind | None = None  # of down_proj's rows; None: they are of the same kind

    @property
    def row(self) -> RowFormat:
        """A row of gate or up."""
        return RowFormat(self.kind, self.hidden)

    @property
    def column(self) -> RowFormat:
        """A row of down_proj: what one output takes of the group's neurons."""
        return RowFormat(self.down_kind or self.kind, self.neurons)

    @property
    def planes(self) -> list[Plane]:
        rows = self.row.planes(self.inputs * self.neurons) + self.column.planes(self.hidden)
        vectors = ((each * self.neurons,) for each in (self.biases, int(self.normed)))
        return [*((dtype, shape[::-1]) for dtype, shape in rows), *((np.float32, shape) for shape in vectors)]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one group."""
        return -(-_nbytes(self.planes) // 64) * 64  # so that all arrays of the next are aligned

    def views(self, raw: Bytes) -> Groups:
        """The parts of records in place. raw: [n, nbytes] uint8, C-contiguous."""
        *arrays, bias, norm = _carve(raw, self.planes)
        rows, count = [array.swapaxes(1, 2) for array in arrays], len(arrays) // 2
        return Groups(self.row.rows(rows[:count]), self.column.rows(rows[count:]), bias, norm)

    def groups(self, raw: Bytes) -> Groups:
        """Records with at least 4 bits a weight: in place, or narrow ones widened."""
        return self.wide(self.views(raw))

    def wide(self, groups: Groups) -> Groups:
        """Groups with at least 4 bits a weight."""
        return Groups(self.row.wide(groups.inputs), self.column.wide(groups.down), groups.bias, groups.norm)


@dataclass(frozen=True)
class NeuronFormat:
    """Bundles of one neuron, a record each, for models of which few neurons take part in a token.

    [row of every input matrix | column of down_proj], each a RowFormat record with blocks of its own, so that no
    neuron needs its neighbours; then the biases of its input rows, if there are any, as float32 [M]. If gates choose
    the neurons, gate rows are elsewhere, and the one input row is that of up.
    """

    kind: RowKind
    hidden: int
    inputs: int = 2  # M
    biases: int = 0  # M or none

    @property
    def row(self) -> RowFormat:
        return RowFormat(self.kind, self.hidden)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one neuron."""
        return (self.inputs + 1) * self.row.nbytes + 4 * self.biases

    def empty(self, neurons: int) -> QuantNeurons | PlainNeurons:
        """Arrays for so many neurons, their memory not touched yet."""
        rows = self.row.empty(neurons * (self.inputs + 1))
        bias = np.empty((neurons, self.biases), np.float32)
        return self._neurons([a.reshape(neurons, self.inputs + 1, a.shape[1]) for a in rows.arrays()], bias)

    def views(self, raw: Bytes) -> QuantNeurons | PlainNeurons:
        """The parts of records in place. raw: [n, nbytes] uint8, C-contiguous."""
        width = (self.inputs + 1) * self.row.nbytes
        rows = self.row.views(raw[:, :width].reshape(len(raw), self.inputs + 1, self.row.nbytes))
        (bias,) = _carve(raw[:, width:], [(np.float32, (self.biases,))])
        return self._neurons(rows.arrays(), bias)

    def _neurons(self, parts: list[Any], bias: Any) -> QuantNeurons | PlainNeurons:
        if self.kind == "f16":
            (w,) = parts
            return PlainNeurons(w, bias)
        q, scale, step = parts
        return QuantNeurons(q, scale, step, bias)
