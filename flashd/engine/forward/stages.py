"""The small graphs between the large products (norms, biases, sums), and the embedding of tokens."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnxruntime as ort

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.products import Vectors
from flashd.engine.model.contract import Tokens
from flashd.engine.model.sizes import KEPT_ROWS
from flashd.system.onnx_session import open_session


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


class Embedder:
    """Numbers of tokens -> what goes into the first layer. The rows are read from the card; some are kept."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._model = bundle, bundle.header.model
        self._table = bundle.header.embedding_table
        self._kept = lru_cache(KEPT_ROWS)(lambda token: bundle.table_rows(self._table, np.array([token])))

    def __call__(self, tokens: Tokens, positions: Tokens) -> Floats:
        """`tokens` [T] at `positions` [T] of a text -> [T, H] float32. Raises DamagedRun, CardError."""
        x = self._kept(int(tokens[0])) if len(tokens) == 1 else self._bundle.table_rows(self._table, tokens)
        if self._model.embedding_scale != 1:
            x = x * np.float32(self._model.embedding_scale)
        if self._model.positions:
            x = x + self._bundle.table_rows("positions", positions)
        return x
