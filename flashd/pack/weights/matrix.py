"""A matrix of a model file: rows of a tensor in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.open_model import Grid, Tensor

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Matrix:
    """Some rows of a tensor, in an order of their own, and perhaps a projection behind them."""

    tensor: Tensor  # [R, P]
    order: Numbers  # [n], numbers of rows
    projection: Floats | None = None  # [P, K]: each row is multiplied by it

    def __len__(self) -> int:
        return len(self.order)

    @property
    def width(self) -> int:
        """K, the weights of a row."""
        return self.tensor.shape[-1] if self.projection is None else self.projection.shape[1]

    @property
    def bits(self) -> float:
        """Bits a weight in the source."""
        return self.tensor.bits

    def rows(self, which: slice | Numbers) -> Floats:
        """Some of the matrix's rows, [n, K] float32. Raises DataError if one is not finite."""
        rows = finite(self.tensor, self.tensor.rows(self.order[which]))  # [n, P]
        return rows if self.projection is None else rows @ self.projection

    def grid(self, which: slice | Numbers) -> Grid | None:
        """The source's own grid of some of the rows. None if it has none."""
        return self.tensor.grid(self.order[which]) if self.projection is None else None


def finite(tensor: Tensor, values: Floats) -> Floats:
    """The values as they are. Raises DataError if one is infinite or not a number."""
    if not np.isfinite(values).all():
        raise DataError(f"tensor {tensor.name!r} has weights that are not finite; download the model again")
    return values


def whole(tensor: Tensor) -> Matrix:
    return Matrix(tensor, np.arange(tensor.shape[0]))
