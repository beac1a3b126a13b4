"""The matrices of multi-head latent attention (bundle.layer_kinds.Latent), whatever a file joins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashd.bundle.layer_kinds import Latent
from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.open_model import ALL, Tensor, Which
from flashd.pack.weights.matrix import Matrix, Numbers, whole

Find = Callable[[str], Tensor | None]
"""A part of a layer by its name in families.family.TENSORS; None if the file has none."""


class _Joined(Tensor):
    """Matrices of all heads [heads, n, K] as one [heads n, K]."""

    def __init__(self, stack: Tensor) -> None:
        if len(stack.shape) != 3:
            raise DataError(
                f"tensor {stack.name!r} has the shape {stack.shape} and should have a matrix for each head"
            )
        self.name, self.bits, self._stack = stack.name, stack.bits, stack
        self.shape = (stack.shape[0] * stack.shape[1], stack.shape[2])

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32."""
        numbers, each = np.arange(self.shape[0])[which], self._stack.shape[1]
        out = np.empty((len(numbers), self.shape[1]), np.float32)
        for head in np.unique(numbers // each).tolist():
            mine = np.flatnonzero(numbers // each == head)
            out[mine] = self._stack.matrix(head).rows(numbers[mine] % each)
        return out


class _Across(Tensor):
    """Of a matrix that makes each head's keys and behind them its values, what makes keys, each [K, n] as [n, K]."""

    def __init__(self, both: Tensor, heads: int, latent: Latent) -> None:
        self.name, self.bits, self._both = both.name, both.bits, both
        self._keys, self._every = latent.unturned, latent.unturned + latent.values
        self.shape = (heads * both.shape[1], latent.unturned)

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32."""
        numbers, rank = np.arange(self.shape[0])[which], self._both.shape[1]
        out = np.empty((len(numbers), self._keys), np.float32)
        for head in np.unique(numbers // rank).tolist():
            mine, first = np.flatnonzero(numbers // rank == head), head * self._every
            out[mine] = self._both.rows(slice(first, first + self._keys)).T[numbers[mine] % rank]
        return out


def latent_matrices(name: str, heads: int, latent: Latent, find: Find) -> list[Matrix]:
    """The matrices of the product `name`. Raises DataError if one is missing or has another number of rows."""

    def of(part: str, order: Numbers) -> Matrix:
        return Matrix(_found(find, part, len(order)), order)

    queries, row = _query_order(heads, latent), np.arange(latent.row)
    row[latent.rank :] = latent.rank + _halves(latent.turned)
    match name:
        case "latent_in":
            first = of("query_down", np.arange(latent.query_rank)) if latent.query_rank else of("query", queries)
            return [first, of("latent_down", row)]
        case "latent_query":
            return [of("query_up", queries)]
    own, both = find("key_up" if name == "latent_key" else "value_up"), find("both_up")
    if own:
        return [whole(_Joined(own))]
    every = latent.unturned + latent.values
    both = _found(find, "both_up", heads * every) if both is None else both
    if both.shape[0] != heads * every:
        raise DataError(f"tensor {both.name!r} has {both.shape[0]} rows and should have {heads * every}")
    if name == "latent_key":
        return [whole(_Across(both, heads, latent))]
    values = np.arange(heads)[:, None] * every + latent.unturned + np.arange(latent.values)
    return [Matrix(both, values.reshape(-1))]


def _found(find: Find, part: str, rows: int) -> Tensor:
    tensor = find(part)
    if tensor is None:
        raise DataError(f"a layer of latent attention lacks its tensor {part!r}")
    if tensor.shape[0] != rows:
        raise DataError(f"tensor {tensor.name!r} has {tensor.shape[0]} rows and should have {rows}")
    return tensor


def _query_order(heads: int, latent: Latent) -> Numbers:
    """The file has each head's queries together, and of what is turned pairs side by side."""
    first = np.arange(heads)[:, None] * (latent.unturned + latent.turned)
    fixed, turned = first + np.arange(latent.unturned), first + latent.unturned + _halves(latent.turned)
    return np.concatenate([fixed.reshape(-1), turned.reshape(-1)])


def _halves(width: int) -> Numbers:
    """Pairs that stand side by side, as halves."""
    return np.arange(width).reshape(-1, 2).T.reshape(-1)
