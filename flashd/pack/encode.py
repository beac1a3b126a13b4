"""Turns a model's matrices into the records of a bundle, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.rows.formats import GroupFormat, NeuronFormat, RowFormat
from flashd.bundle.rows.kinds import BLOCK, Bytes, Floats, RowKind
from flashd.errors import DataError
from flashd.pack.lossy.calibration import hottest, neurons_of
from flashd.pack.lossy.narrow_groups import Weigh
from flashd.pack.open_model import Grid
from flashd.pack.rounding.gptq import encode_fed
from flashd.pack.rounding.rows import encode_groups, encode_neurons, encode_rows
from flashd.pack.weights.matrix import Matrix, Numbers
from flashd.pack.weights.weights import Ffn

ROWS_AT_ONCE = 1024
MOST_F16 = float(np.finfo(np.float16).max)


def nobody(weights: int) -> None:
    """A `count` of Encoder that does nothing."""


class Encoder:
    """Encodes matrices of one model as records.

    Args:
        model: the model's architecture.
        count: is called with how many more weights are encoded.
    """

    def __init__(self, model: Architecture, count: Callable[[int], None] = nobody) -> None:
        self._model, self._count = model, count

    def vectors(self, vectors: dict[str, Floats]) -> Iterator[bytes]:
        """The vectors as float32, one behind the other."""
        for vector in vectors.values():
            self._count(vector.size)
            yield vector.tobytes()

    def rows(self, matrix: Matrix, kind: RowKind, centred: bool = True) -> Iterator[bytes]:
        """The records of a matrix's rows, chunk by chunk. If not `centred`, every centre is zero."""
        form = RowFormat(kind, matrix.width)
        for at in range(0, len(matrix), ROWS_AT_ONCE):
            yield self._records(matrix, form, slice(at, at + ROWS_AT_ONCE), centred).tobytes()

    def neurons(self, ffn: Ffn, form: NeuronFormat, order: Numbers) -> Iterator[bytes]:
        """The records of an FFN's neurons in the order [F] of the card, chunk by chunk."""
        down, bias, _ = ffn.filled(ffn.whole)  # [H, F], [F, M]
        for at in range(0, len(order), ROWS_AT_ONCE):
            neurons = order[at : at + ROWS_AT_ONCE]
            records = [self._filled(matrix, form.row, neurons) for matrix in ffn.inputs]
            self._count(form.hidden * len(neurons))
            yield encode_neurons(records, down[:, neurons], bias[neurons], form).tobytes()

    def neuron_rows(self, matrix: Matrix, form: RowFormat, order: Numbers) -> Iterator[bytes]:
        """The rows of an input matrix, in the order of the card."""
        for at in range(0, len(order), ROWS_AT_ONCE):
            yield self._filled(matrix, form, order[at : at + ROWS_AT_ONCE]).tobytes()

    def groups(self, ffn: Ffn, form: GroupFormat, order: Numbers, weigh: Weigh | None = None) -> Iterator[bytes]:
        """Neurons in their order. If every 32 of them are a group of the source, its grid moves over."""
        every = ffn.whole
        (down, bias, norm), grid = ffn.filled(every), ffn.down.grid()
        columns = np.pad(weigh.neurons, (0, every - ffn.neurons)) if weigh else None
        of_inputs = weigh.inputs if weigh else None
        for at in range(0, len(order), form.neurons):
            neurons = order[at : at + form.neurons]
            records = [self._filled(matrix, form.row, neurons, of_inputs) for matrix in ffn.inputs]
            self._count(form.hidden * len(neurons))
            some = None if columns is None else columns[neurons]
            of_norm = norm[neurons] if form.normed else norm
            yield encode_groups(
                records, down[:, neurons], bias[neurons], of_norm, form, _grid_of(grid, neurons), some
            ).tobytes()

    def order(self, ffn: Ffn, sizes: Floats) -> Numbers:
        """[F]: the card's order of an FFN's neurons, by the sizes [F] of their shares in the output."""
        return hottest(sizes, whole=ffn.down.grid(slice(1)) is not None)

    def _filled(self, matrix: Matrix, form: RowFormat, neurons: Numbers, weigh: Floats | None = None) -> Bytes:
        """[n, row bytes]: the records of the rows of `neurons` [n]. Neurons that only fill the last group are zero.

        `weigh`: [H, H], see encode_fed, or how much a squared error of each weight counts, [H].
        """
        real = neurons < len(matrix)
        out = np.zeros((len(neurons), form.nbytes), np.uint8)
        out[real] = self._records(matrix, form, neurons[real], weigh=weigh)
        return out

    def _records(
        self,
        matrix: Matrix,
        form: RowFormat,
        which: slice | Numbers,
        centred: bool = True,
        weigh: Floats | None = None,
    ) -> Bytes:
        """[n, row bytes]: the records of some rows of a matrix."""
        weights = matrix.rows(which)  # [n, K]
        self._count(weights.size)
        if form.kind == "f16" and np.abs(weights).max(initial=0) > MOST_F16:
            raise DataError(
                f"tensor {matrix.tensor.name!r} has weights above {MOST_F16:.0f}, which f16 rows cannot hold"
            )
        if weigh is not None:
            if weigh.ndim == 2:
                return encode_fed(weights, form, weigh)
            return encode_rows(weights, form, weigh=weigh.reshape(1, -1, BLOCK))
        return encode_rows(weights, form, matrix.grid(which), centred)


def _grid_of(grid: Grid | None, neurons: Numbers) -> Grid | None:
    """The part of a down_proj's grid that belongs to `neurons` [n]. None if they are not groups of the source."""
    groups = neurons[::BLOCK] // BLOCK
    if grid is None or (neurons != neurons_of(groups)).any():
        return None
    return grid[0][:, groups], grid[1][:, groups]
