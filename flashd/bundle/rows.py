"""How rows of weights are written in a bundle: the byte layout that the packer and the engine share.

A *row* is what multiplies one input vector or is scaled by one activation. Quantised rows are cut into
blocks of 32 weights; a weight is

    w = scale * (q - zero) + centre

with q an unsigned 4- or 8-bit integer, zero = 8 or 128, and scale and centre given a block. Keeping a
centre (and not an integer zero point) is what lets a 4-bit source such as Q4_1 or Q4_K move over without
loss: re-rounding SmolLM2's rows to symmetric 4-bit blocks costs a mean KL of 0.30, this costs 0.0001.
Narrow rows, of 3 or 2 bits, are the same with zero 4 or 2; a row of 3 bits has the lower two bits of all its
weights, then the upper ones. Scales and centres are codes, in parts of the largest of a run of blocks, which is kept
as float16. The codes of 4-bit rows and narrower ones have 8 bits, so that a row takes about 4.5 bits a weight, as
Q4_K does; those of 8-bit rows have 16, so that the codes' own rounding stays below the weights'.

Ternary rows hold weights of -scale, 0 and scale, with one float32 scale a row, as they are: 2 bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from math import prod
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

BLOCK = 32
"""Weights that share a scale and a centre; also the neurons of one bundle group."""


RowKind = Literal["int4", "int8", "f16", "ternary", "int3", "int2"]
ROW_KINDS: tuple[RowKind, ...] = ("int4", "int8", "f16")
"""What may be asked for. Weights that are ternary stay so where few bits are wanted."""

NARROW: tuple[RowKind, ...] = ("int3", "int2")
"""What the card has of groups that matter little in a bundle of int4 rows: as soon as they are read they are int4."""

BITS: dict[RowKind, int] = {"int4": 4, "int8": 8, "f16": 16, "ternary": 2, "int3": 3, "int2": 2}

CODE_TYPES: dict[RowKind, tuple[type[np.unsignedinteger[Any]], type[np.signedinteger[Any]]]] = {
    "int4": (np.uint8, np.int8),
    "int8": (np.uint16, np.int16),
    "int3": (np.uint8, np.int8),
    "int2": (np.uint8, np.int8),
}
"""The types of scale codes and centre codes; the largest of each type stands for the largest of a run."""

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Slots:
    """Arrays that share their leading axis: one entry an item (a row, or a group of bundles)."""

    def arrays(self) -> list[npt.NDArray[np.generic]]:
        return [getattr(self, f.name) for f in fields(self)]

    def __len__(self) -> int:
        return len(self.arrays()[0])

    def __getitem__(self, part: slice | npt.NDArray[np.integer[Any]]) -> Self:
        return type(self)(*(a[part] for a in self.arrays()))

    def take(self, source: Slots) -> None:
        """Copies the items of `source`, which has as many, in place of what is here."""
        for to, values in zip(self.arrays(), source.arrays(), strict=True):
            np.copyto(to, values)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())


@dataclass(frozen=True)
class QuantRows(Slots):
    """n quantised rows of K weights, B = K / 32 blocks each."""

    q: Bytes  # [n, K * bits / 8] uint8, low bits first
    scale: Codes  # [n, B]
    centre: Codes  # [n, B]
    step: npt.NDArray[np.float16]  # [n, 2]: the largest scale and the largest centre of the row


@dataclass(frozen=True)
class PlainRows(Slots):
    """n rows of K float16 weights."""

    w: npt.NDArray[np.float16]  # [n, K]


@dataclass(frozen=True)
class TernaryRows(Slots):
    """n rows of K weights scale * (q - 2), with q 1, 2 or 3."""

    q: Bytes  # [n, K / 4], low bits first
    scale: Floats  # [n, 1]


@dataclass(frozen=True)
class QuantGroups(Slots):
    """n groups of 32 bundles each. M input matrices (gate and up: 2), hidden size H."""

    q: Bytes  # [n, 32, M, H * bits / 8]
    scale: Codes  # [n, 32, M, H / 32]
    centre: Codes  # [n, 32, M, H / 32]
    step: npt.NDArray[np.float16]  # [n, 32, M, 2]
    down: Bytes  # [n, 32, H * bits / 8]: neuron i's column of down_proj
    down_scale: Codes  # [n, H]: blocks of down_proj run along the neurons, one a group and output
    down_centre: Codes  # [n, H]
    down_step: npt.NDArray[np.float16]  # [n, 2, H / 32]
    bias: Floats  # [n, 32, M], or [n, 32, 0] where the inputs have none


@dataclass(frozen=True)
class PlainGroups(Slots):
    """n groups of 32 bundles of float16 weights."""

    w: npt.NDArray[np.float16]  # [n, 32, M, H]
    down: npt.NDArray[np.float16]  # [n, 32, H]
    bias: Floats  # [n, 32, M], or [n, 32, 0] where the inputs have none


@dataclass(frozen=True)
class TernaryGroups(Slots):
    """n groups of 32 bundles of ternary weights; each row and each column of down_proj has its own scale."""

    q: Bytes  # [n, 32, M, H / 4]
    scale: Floats  # [n, 32, M, 1]
    down: Bytes  # [n, 32, H / 4]
    down_scale: Floats  # [n, 32, 1]
    bias: Floats  # [n, 32, M], or [n, 32, 0] where the inputs have none


Rows = QuantRows | PlainRows | TernaryRows
Groups = QuantGroups | PlainGroups | TernaryGroups


@dataclass(frozen=True)
class QuantNeurons(Slots):
    """n bundles of one neuron each: M input rows, then the column of down_proj as a row like them."""

    q: Bytes  # [n, M + 1, H * bits / 8]
    scale: Codes  # [n, M + 1, H / 32]
    centre: Codes  # [n, M + 1, H / 32]
    step: npt.NDArray[np.float16]  # [n, M + 1, 2]
    bias: Floats  # [n, M], or [n, 0] where the inputs have none


@dataclass(frozen=True)
class PlainNeurons(Slots):
    """n bundles of one neuron each, of float16 weights."""

    w: npt.NDArray[np.float16]  # [n, M + 1, H]
    bias: Floats  # [n, M], or [n, 0] where the inputs have none


@dataclass(frozen=True)
class PairedNeurons(Slots):
    """n neurons without their gate rows: the row of up_proj, and the column of down_proj without its steps."""

    q: Bytes  # [n, H * bits / 8]
    scale: Codes  # [n, H / 32]
    centre: Codes  # [n, H / 32]
    step: npt.NDArray[np.float16]  # [n, 2]
    down: Bytes  # [n, H * bits / 8]


@dataclass(frozen=True)
class ColumnSteps(Slots):
    """The steps of down_proj's columns: of n groups, which share them, or gathered for n neurons."""

    scale: Codes  # [n, H]
    centre: Codes  # [n, H]
    step: npt.NDArray[np.float16]  # [n, 2, H / 32]


NeuronSlots = QuantNeurons | PlainNeurons | PairedNeurons


@cache
def unit_steps(kind: RowKind) -> Floats:
    """[2] float32: what one code of scale and of centre is worth, in parts of the largest."""
    return np.array([1 / np.iinfo(code).max for code in CODE_TYPES[kind]], np.float32)


def _carve(raw: Bytes, widths: list[tuple[Any, tuple[int, ...]]]) -> list[Any]:
    """Views of the consecutive parts of records. raw: [..., record bytes]."""
    parts, at = [], 0
    for dtype, shape in widths:
        size = prod(shape) * np.dtype(dtype).itemsize
        part = raw[..., at : at + size].view(dtype)
        parts.append(part.reshape(*raw.shape[:-1], *shape))
        at += size
    return parts


@dataclass(frozen=True)
class RowFormat:
    """Rows of `width` weights, a record each: [q | scale codes | centre codes | two float16 steps].

    Of f16 rows it is the weights alone, of ternary rows [q | a float32 scale].
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
        """The parts of records in place. raw: [n, nbytes] uint8, unaligned parts included."""
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
    """What the two ways to write bundles have in common."""

    kind: RowKind
    hidden: int
    inputs: int = 2  # M
    biases: int = 0  # M or none

    @property
    def row(self) -> RowFormat:
        return RowFormat(self.kind, self.hidden)


@dataclass(frozen=True)
class GroupFormat(_BundleFormat):
    """Bundles of 32 neurons, a record each.

    Quantised: 32 bundles, each [row of every input matrix (a RowFormat record) | column of down_proj
    (q only)], then what the 32 columns share: [down scale codes | down centre codes | steps]. So a neuron is
    one contiguous read, and so is a run of groups (section 3.2 of the paper). Biases of the input rows, where
    there are any, end the record as float32 [32, M]. Columns of f16 and ternary bundles are RowFormat records too,
    and share nothing.
    """

    @property
    def column_bytes(self) -> int:
        return self.row.nbytes if self.kind == "ternary" else self.hidden * self.row.bits // 8

    @property
    def bundle_bytes(self) -> int:
        """Bytes of one neuron."""
        return self.inputs * self.row.nbytes + self.column_bytes

    @property
    def tail_bytes(self) -> int:
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
        """The parts of records in place. raw: [n, nbytes] uint8, C-contiguous."""
        n, m = len(raw), self.inputs
        body = raw[:, : BLOCK * self.bundle_bytes].reshape(n, BLOCK, self.bundle_bytes)
        rows = body[:, :, : m * self.row.nbytes].reshape(n, BLOCK, m, self.row.nbytes)
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
        """What 32 columns share."""
        codes = [(code, (self.hidden,)) for code in CODE_TYPES[self.kind]]
        return [*codes, (np.float16, (2, self.row.blocks))]

    @property
    def step_bytes(self) -> int:
        """Bytes of what the columns of a quantised group share."""
        return self.tail_bytes - 4 * BLOCK * self.biases

    def steps(self, raw: Bytes) -> ColumnSteps:
        """What the columns of groups share, in place. raw: [n, step_bytes] uint8."""
        return ColumnSteps(*_carve(raw, self._shared))

    def groups(self, raw: Bytes) -> Groups:
        """Records as products take them: in place, or narrow ones with 4 bits a weight."""
        groups = self.views(raw)
        if self.kind not in NARROW:
            return groups
        assert isinstance(groups, QuantGroups)
        bits = self.row.bits
        return replace(groups, q=_widened(groups.q, bits), down=_widened(groups.down, bits))


@dataclass(frozen=True)
class NeuronFormat(_BundleFormat):
    """Bundles of one neuron, a record each, for models of which few neurons take part in a token.

    [row of every input matrix | column of down_proj], each a RowFormat record with blocks of its own, so that no
    neuron needs its neighbours; then the biases of its input rows, where there are any, as float32 [M].
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

    def _neurons(self, parts: list[Any], bias: Floats) -> QuantNeurons | PlainNeurons:
        if self.kind == "f16":
            (w,) = parts
            return PlainNeurons(w, bias)
        q, scale, centre, step = parts
        return QuantNeurons(q, scale, centre, step, bias)


@dataclass(frozen=True)
class PairFormat(_BundleFormat):
    """Neurons whose gate rows stay in RAM, a record each: [up row | down column (q only)].

    The steps of the columns stay in RAM too: 32 neurons share them, as in a group, so that nothing is rounded anew.
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
        """Arrays for so many neurons, their memory not touched yet."""
        down = np.empty((neurons, self.hidden * self.row.bits // 8), np.uint8)
        parts: list[Any] = [*self.row.empty(neurons).arrays(), down]
        return PairedNeurons(*parts)

    def views(self, raw: Bytes) -> PairedNeurons:
        """The parts of records in place. raw: [n, nbytes] uint8."""
        row = self.row.views(raw[:, : self.row.nbytes])
        parts: list[Any] = [*row.arrays(), raw[:, self.row.nbytes :]]
        return PairedNeurons(*parts)


def pack_bits(q: Bytes, bits: int) -> Bytes:
    """Integers [..., K] as packed bytes [..., K * bits / 8], the first of a byte's in the low bits."""
    if bits == 3:
        lower, upper = np.bitwise_and(q, 3, dtype=np.uint8), np.right_shift(q, 2, dtype=np.uint8)
        return np.concatenate([pack_bits(lower, 2), pack_bits(upper, 1)], axis=-1)
    step = 8 // bits
    packed = q[..., 0::step]
    for i in range(1, step):
        packed = np.bitwise_or(packed, q[..., i::step] << (i * bits), dtype=np.uint8)
    return packed


def unpack(q: Bytes, bits: int) -> Bytes:
    """Packed integers [..., K * bits / 8] as bytes [..., K]."""
    if bits == 8:
        return q
    if bits == 3:
        lower = q.shape[-1] * 2 // 3
        upper = np.left_shift(unpack(q[..., lower:], 1), 2, dtype=np.uint8)
        return np.asarray(unpack(q[..., :lower], 2) | upper, np.uint8)
    step, most = 8 // bits, (1 << bits) - 1
    out = np.empty((*q.shape[:-1], q.shape[-1] * step), np.uint8)
    for i in range(step):
        np.bitwise_and(q >> (i * bits), most, out=out[..., i::step])
    return out


def _widened(q: Bytes, bits: int) -> Bytes:
    """Packed integers of 3 or 2 bits [..., K * bits / 8] as nibbles [..., K / 2] that stand for as much."""
    lower = q.shape[-1] * 2 // bits
    out = _nibbles(2, bits)[q[..., :lower]]  # [..., K / 4] uint16
    if bits == 3:
        upper = out.view("<u4")
        upper += _nibbles(1, bits)[q[..., lower:]]  # no nibble carries: the largest is 11
    return out.view(np.uint8)


@cache
def _nibbles(part: int, bits: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """[256]: the nibbles of a byte that holds `part` bits of each weight, its lower two or the upper one."""
    values = unpack(np.arange(256, dtype=np.uint8)[:, None], part).astype(np.uint32)  # [256, weights]
    values = values * np.uint32(4) if part == 1 else values + np.uint32(8 - (1 << (bits - 1)))
    words = pack_bits(values.astype(np.uint8), 4)
    return words.view("<u2" if part == 2 else "<u4").reshape(256)
