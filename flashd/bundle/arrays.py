"""Arrays of rows, groups and neurons in RAM, in the bundle's own format. They may be views of what the card gave."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flashd.bundle.row_kinds import Bytes, Codes, Floats


@dataclass(frozen=True)
class Arrays:
    """Arrays with one leading axis in common: an entry for each item. An item is a row, a group or a neuron."""

    def arrays(self) -> list[npt.NDArray[np.generic]]:
        """The arrays, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def __len__(self) -> int:
        return len(self.arrays()[0])

    def __getitem__(self, part: slice | npt.NDArray[np.integer[Any]]) -> Self:
        return type(self)(*(a[part] for a in self.arrays()))

    def take(self, source: Arrays) -> None:
        """Copies the items of `source`, which has as many, over those here."""
        for to, values in zip(self.arrays(), source.arrays(), strict=True):
            np.copyto(to, values)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())


@dataclass(frozen=True)
class QuantRows(Arrays):
    """n quantised rows of K weights in B = K / 32 blocks. A weight is scale * (q - zero) + centre."""

    q: Bytes  # [n, K * bits / 8] uint8, low bits first
    scale: Codes  # [n, B]
    centre: Codes  # [n, B]
    step: npt.NDArray[np.float16]  # [n, 2]: the largest scale and the largest centre of the row


@dataclass(frozen=True)
class PlainRows(Arrays):
    """n rows of K float16 weights."""

    w: npt.NDArray[np.float16]  # [n, K]


@dataclass(frozen=True)
class TernaryRows(Arrays):
    """n rows of K weights scale * (q - 2), with q 1, 2 or 3."""

    q: Bytes  # [n, K / 4], low bits first
    scale: Floats  # [n, 1]


@dataclass(frozen=True)
class QuantGroups(Arrays):
    """n groups of 32 quantised neurons each, with M input matrices (gate and up: 2) and hidden size H."""

    q: Bytes  # [n, 32, M, H * bits / 8]
    scale: Codes  # [n, 32, M, H / 32]
    centre: Codes  # [n, 32, M, H / 32]
    step: npt.NDArray[np.float16]  # [n, 32, M, 2]
    down: Bytes  # [n, 32, H * bits / 8]: neuron i's column of down_proj
    down_scale: Codes  # [n, H]: a block of down_proj has the group's 32 neurons in one output
    down_centre: Codes  # [n, H]
    down_step: npt.NDArray[np.float16]  # [n, 2, H / 32]
    bias: Floats  # [n, 32, M], or [n, 32, 0] if the inputs have none


@dataclass(frozen=True)
class PlainGroups(Arrays):
    """n groups of 32 neurons of float16 weights."""

    w: npt.NDArray[np.float16]  # [n, 32, M, H]
    down: npt.NDArray[np.float16]  # [n, 32, H]
    bias: Floats  # [n, 32, M], or [n, 32, 0] if the inputs have none


@dataclass(frozen=True)
class TernaryGroups(Arrays):
    """n groups of 32 neurons of ternary weights. Each row and each column of down_proj has a scale of its own."""

    q: Bytes  # [n, 32, M, H / 4]
    scale: Floats  # [n, 32, M, 1]
    down: Bytes  # [n, 32, H / 4]
    down_scale: Floats  # [n, 32, 1]
    bias: Floats  # [n, 32, M], or [n, 32, 0] if the inputs have none


Rows = QuantRows | PlainRows | TernaryRows
Groups = QuantGroups | PlainGroups | TernaryGroups


@dataclass(frozen=True)
class QuantNeurons(Arrays):
    """n quantised neurons: M input rows each, then the column of down_proj as one more row."""

    q: Bytes  # [n, M + 1, H * bits / 8]
    scale: Codes  # [n, M + 1, H / 32]
    centre: Codes  # [n, M + 1, H / 32]
    step: npt.NDArray[np.float16]  # [n, M + 1, 2]
    bias: Floats  # [n, M], or [n, 0] if the inputs have none


@dataclass(frozen=True)
class PlainNeurons(Arrays):
    """n neurons of float16 weights: M input rows each, then the column of down_proj."""

    w: npt.NDArray[np.float16]  # [n, M + 1, H]
    bias: Floats  # [n, M], or [n, 0] if the inputs have none


@dataclass(frozen=True)
class PairedNeurons(Arrays):
    """n neurons without their gate rows: the row of up_proj and the column of down_proj, without its ColumnSteps."""

    q: Bytes  # [n, H * bits / 8]
    scale: Codes  # [n, H / 32]
    centre: Codes  # [n, H / 32]
    step: npt.NDArray[np.float16]  # [n, 2]
    down: Bytes  # [n, H * bits / 8]


@dataclass(frozen=True)
class ColumnSteps(Arrays):
    """The steps of down_proj's columns: of n groups, whose columns share them, or gathered for n neurons."""

    scale: Codes  # [n, H]
    centre: Codes  # [n, H]
    step: npt.NDArray[np.float16]  # [n, 2, H / 32]


NeuronArrays = QuantNeurons | PlainNeurons | PairedNeurons
