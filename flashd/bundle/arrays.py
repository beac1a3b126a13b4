"""Arrays of rows, groups and neurons as they lie in RAM: views of the bundle's own bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import CODE_TYPES, Bytes, Codes, Floats, RowKind


@dataclass(frozen=True)
class Arrays:
    """Arrays that share their leading axis: one entry an item (a row, or a neuron)."""

    def arrays(self) -> list[npt.NDArray[np.generic]]:
        return [getattr(self, f.name) for f in fields(self)]

    def __len__(self) -> int:
        return len(self.arrays()[0])

    def __getitem__(self, part: int | slice | npt.NDArray[np.integer[Any]]) -> Self:
        return type(self)(*(a[part] for a in self.arrays()))

    def take(self, source: Arrays) -> None:
        """Copies the items of `source`, which has as many, in place of what is here."""
        for to, values in zip(self.arrays(), source.arrays(), strict=True):
            np.copyto(to, values)

    def joined(self) -> Self:
        """The two leading axes as one, each array contiguous."""
        return type(self)(*(np.ascontiguousarray(a.reshape(-1, a.shape[-1])) for a in self.arrays()))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())


@dataclass(frozen=True)
class QuantRows(Arrays):
    """n quantised rows of K weights, B = K / 32 blocks each, and of C digits of the blocks' centres.

    The input of a product with them is followed by the sums of its blocks, twice: see engine.forward.products.
    """

    q: Bytes  # [n, (K + C) * bits / 8] uint8, low bits first
    scale: Codes  # [n, B]
    step: npt.NDArray[np.float16]  # [n, 2]: the largest scale and the largest centre of the row

    @property
    def kind(self) -> RowKind:
        """As products take them: narrow rows are widened before."""
        return "int8" if self.scale.dtype == CODE_TYPES["int8"] else "int4"


@dataclass(frozen=True)
class PlainRows(Arrays):
    """n rows of K float16 weights."""

    w: npt.NDArray[np.float16]  # [n, K]
    kind: ClassVar[RowKind] = "f16"


@dataclass(frozen=True)
class TernaryRows(Arrays):
    """n rows of K weights scale * (q - 2), with q 1, 2 or 3."""

    q: Bytes  # [n, K / 4], low bits first
    scale: Floats  # [n, 1]
    kind: ClassVar[RowKind] = "ternary"


@dataclass(frozen=True)
class Mxfp4Rows(Arrays):
    """n rows of K weights of MXFP4, B = K / 32 blocks each, see bundle.rows.mxfp4."""

    q: Bytes  # [n, K / 2], low bits first
    exponent: Bytes  # [n, B]
    kind: ClassVar[RowKind] = "mxfp4"


Rows = QuantRows | PlainRows | TernaryRows | Mxfp4Rows


@dataclass(frozen=True)
class Groups:
    """n groups of N neurons each. M input matrices (gate and up: 2), hidden size H."""

    inputs: Rows  # the arrays of rows of H weights, [n, M N, ...]: all of the first matrix, then of the next
    down: Rows  # of rows of N weights, [n, H, ...]. Memory has both as [n, ..., rows]
    bias: Floats  # [n, M N], or [n, 0] if the inputs have none
    norm: Floats  # [n, N]: activations are multiplied by it in models that norm them; else [n, 0]

    def __len__(self) -> int:
        return len(self.bias)

    def __getitem__(self, part: slice) -> Groups:
        return Groups(self.inputs[part], self.down[part], self.bias[part], self.norm[part])

    def arrays(self) -> list[npt.NDArray[Any]]:
        return [*self.inputs.arrays(), *self.down.arrays(), self.bias, self.norm]

    def of(self, arrays: list[Any]) -> Groups:
        """Groups of the same kinds of rows, of arrays in the order of `arrays`."""
        rows = len(self.inputs.arrays())
        return Groups(type(self.inputs)(*arrays[:rows]), type(self.down)(*arrays[rows:-2]), *arrays[-2:])


@dataclass(frozen=True)
class QuantNeurons(Arrays):
    """n bundles of one neuron each: M input rows, then the column of down_proj as a row like them."""

    q: Bytes  # [n, M + 1, (H + C) * bits / 8]
    scale: Codes  # [n, M + 1, H / 32]
    step: npt.NDArray[np.float16]  # [n, M + 1, 2]
    bias: Floats  # [n, M], or [n, 0] if the inputs have none


@dataclass(frozen=True)
class PlainNeurons(Arrays):
    """n bundles of one neuron each, of float16 weights."""

    w: npt.NDArray[np.float16]  # [n, M + 1, H]
    bias: Floats  # [n, M], or [n, 0] if the inputs have none


NeuronArrays = QuantNeurons | PlainNeurons
