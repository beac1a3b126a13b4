"""The small graphs between the large products (norms, biases, sums), and the embedding of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.arrays import Rows
from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants, at_least_two, multiplied
from flashd.engine.forward.products import Vectors
from flashd.engine.model.contract import CardStats, Tokens
from flashd.engine.model.sizes import KEPT_ROWS, TOKENS_AT_ONCE
from flashd.graphs.in_place import graph
from flashd.system.onnx_session import open_session

Count = Callable[[int], None]
"""Called with the bytes of a read."""


def input_names(session: ort.InferenceSession) -> list[str]:
    """The names of a graph's inputs, in order."""
    return [i.name for i in session.get_inputs()]


class Stage:
    """A small graph between the large products. It takes its inputs by name."""

    def __init__(self, graph: bytes) -> None:
        self._session = open_session(graph)
        self._names = input_names(self._session)

    def __call__(self, vectors: Vectors, **values: Floats) -> list[Floats]:
        """The graph's outputs for `values` and those of `vectors` that it has inputs for."""
        feed = {name: values[name] if name in values else vectors[name] for name in self._names}
        return list(self._session.run(None, feed))


def named(values: Floats, lengths: dict[str, int]) -> Vectors:
    """Cuts `values` [n] into consecutive vectors of the given lengths, by name."""
    ends = np.cumsum(list(lengths.values()), dtype=np.int64)
    return dict(zip(lengths, np.split(values, ends[:-1]), strict=True)) if lengths else {}


def vectors_of(bundle: Bundle, layer: int) -> Vectors:
    """The small vectors of a layer, by name. Raises DamagedRun, CardError."""
    return named(bundle.floats(f"layer.{layer}.vectors"), bundle.header.model.layer_vectors(layer))


class Leave:
    """What is behind the FFN of each layer: norms, sums, and what a token says to the layer."""

    def __init__(self, bundle: Bundle, constants: Constants) -> None:
        self._bundle, self._model, self._constants = bundle, bundle.header.model, constants
        self._stage = Stage(graph(bundle.header, "leave"))
        self._vectors: list[Vectors] = []
        self._sessions: list[ort.InferenceSession] = []

    def load(self, layer: int) -> None:
        """Opens the next layer's. Raises DamagedRun, CardError."""
        at, behind = f"layer.{layer}.", self._model.products_behind()
        vectors = vectors_of(self._bundle, layer)
        self._vectors.append(vectors)
        if behind:
            products = [self._bundle.rows(f"{at}{product.name}") for product in behind]
            self._sessions.append(self._constants.leave(layer, products, vectors))

    def __call__(self, layer: int, x: Floats, branch: Floats, token: Floats) -> Floats:
        """x [T, carried_width] behind the attention -> x [T, H] of the next layer.

        `branch` [T, W]: the FFN's output; `token` [T, P]: the layer's token inputs.
        """
        if self._sessions:
            return multiplied(self._sessions[layer], x=x, branch=branch, token=token)
        return self._stage(self._vectors[layer], x=x, branch=branch)[0]


class Finish:
    """What is behind the last layer and in front of the head: the last norm, and what makes one of several states."""

    def __init__(self, bundle: Bundle, constants: Constants, vectors: Vectors) -> None:
        self._vectors = vectors
        self._stage = Stage(graph(bundle.header, "finish")) if not bundle.header.model.streams else None
        self._session = constants.finish(bundle.rows("stream_out"), vectors) if self._stage is None else None

    def __call__(self, x: Floats) -> Floats:
        """x [T, stream_width] -> h [T, H]"""
        return multiplied(self._session, x=x) if self._stage is None else self._stage(self._vectors, x=x)[0]


def nowhere(number: int) -> Rows | None:  # noqa: ARG001
    """No row is in RAM."""
    return None


class TableRows:
    """Rows of a table that stays on the card, read as they are asked for. The last ones are kept.

    `in_ram` gives those that are in RAM in any case.
    """

    def __init__(
        self, bundle: Bundle, table: str, count: Count, in_ram: Callable[[int], Rows | None] = nowhere
    ) -> None:  # fmt: skip
        form, self._in_ram = bundle.header.row_format(table), in_ram

        def read(number: int) -> Rows:
            record, nbytes = bundle.table_record(table, number)
            count(nbytes)
            return form.views(np.frombuffer(record, np.uint8)[None])

        self._form, self._read = form, lru_cache(KEPT_ROWS)(read)

    def __call__(self, numbers: Tokens) -> Floats:
        """Rows `numbers` [T] -> [T, K]. Raises DamagedRun, CardError, DataError."""
        rows = [self._in_ram(number) or self._read(number) for number in numbers.tolist()]
        by_name = zip(*(row.arrays() for row in rows), strict=True)
        arrays: list[npt.NDArray[Any]] = [np.concatenate(parts) for parts in by_name]
        return dequantise(type(rows[0])(*arrays), self._form.kind)


class Embedder:
    """Numbers of tokens -> what goes into the first layer, and what they say to each layer.

    `card` counts what is read of the tables. `likely` gives rows of the head that are in RAM: if the embeddings are
    the head's rows, these are not read.
    """

    def __init__(
        self, bundle: Bundle, constants: Constants, card: CardStats, likely: Callable[[int], Rows | None] = nowhere
    ) -> None:  # fmt: skip
        self._model, model, self._card = bundle.header.model, bundle.header.model, card
        table = bundle.header.embedding_table
        self._rows = TableRows(bundle, table, self._count, likely if table == "head" else nowhere)
        self._positions = TableRows(bundle, "positions", self._count) if model.positions else None
        self._inputs: TableRows | None = None
        self._doubled = constants.arithmetic == "float32"
        self._spread = constants.spread(bundle.rows("stream_projection")) if model.streams else None
        if model.token_inputs:
            self._inputs = TableRows(bundle, "token_inputs", self._count)
            norm = named(bundle.floats("vectors"), model.model_vectors())["token_norm.weight"]
            self._session = constants.token_inputs(bundle.rows("token_projection"), norm)

    def __call__(self, tokens: Tokens, positions: Tokens) -> tuple[Floats, Floats]:
        """`tokens` [T] at `positions` [T] of a text -> x [T, stream_width], and inputs [L, T, P] of the layers.

        P is 0 if the model has no such inputs. Raises DamagedRun, CardError.
        """
        x = self._rows(tokens)
        if self._model.embedding_scale != 1:
            x = x * np.float32(self._model.embedding_scale)
        if self._positions:
            x = x + self._positions(positions)
        parts = [slice(at, at + TOKENS_AT_ONCE) for at in range(0, len(tokens), TOKENS_AT_ONCE)]
        inner = x
        if self._spread:
            states = [multiplied(self._spread, self._doubled, x=x[part]) for part in parts]
            inner = states[0] if len(states) == 1 else np.concatenate(states)
        if self._inputs is None:
            return inner, np.empty((self._model.layers, len(tokens), 0), np.float32)
        said = [self._said(x[part], self._inputs(tokens[part])) for part in parts]
        return inner, said[0] if len(said) == 1 else np.concatenate(said, axis=1)

    def _said(self, x: Floats, rows: Floats) -> Floats:
        """[L, T, P] of embeddings [T, H] and rows [T, L P] of the table."""
        wide = at_least_two if self._doubled else np.asarray
        (y,) = self._session.run(None, {"x": wide(x)[None], "rows": wide(rows)[None]})
        return np.ascontiguousarray(y[:, : len(x)], np.float32)

    def _count(self, nbytes: int) -> None:
        self._card.table_bytes += nbytes
