"""The routers of a mixture, which say what experts each token uses, and the experts' vectors. They stay in RAM."""

from __future__ import annotations

import numpy as np

from flashd.bundle.arrays import Rows
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward import products, stages
from flashd.engine.forward.constants import at_least_two
from flashd.engine.paging.eviction import Numbers
from flashd.graphs.in_place import graph


class Router:
    """The routers of all layers. `early` says whether they take a layer's input rather than its FFN's."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._model = bundle, bundle.header.model
        assert self._model.experts is not None
        self.early = self._model.experts.early
        self._product = products.Linear(graph(bundle.header, "linear.f16"), "f16")
        self._route = stages.Stage(graph(bundle.header, "route"))
        self._rows: dict[int, Rows] = {}  # by layer, [E, H] each
        self._vectors: dict[int, products.Vectors] = {}

    def load(self, layer: int) -> None:
        """Reads the router of a layer. Raises DamagedRun, CardError."""
        self._rows[layer] = self._bundle.rows(f"layer.{layer}.router")
        lengths = self._model.expert_vectors()
        self._vectors[layer] = stages.named(self._bundle.floats(f"layer.{layer}.experts"), lengths) if lengths else {}

    def __call__(self, layer: int, x: Floats) -> tuple[Numbers, Floats]:
        """x [T, H] -> (numbers of the K experts that each token uses [T, K] int64, their weights [T, K] float32)."""
        scores = self._product(at_least_two(x), self._rows[layer])[: len(x)]
        used, weights = self._route(self._vectors[layer], scores=scores)
        return np.asarray(used, np.int64), weights

    def biases(self, layer: int, used: Numbers) -> Floats:
        """[T, K, H]: the biases of the outputs of the experts `used` [T, K], zeros if there are none; a new array."""
        shape = (*used.shape, self._model.hidden)
        bias = self._vectors[layer].get("down.bias")
        return np.zeros(shape, np.float32) if bias is None else bias.reshape(-1, shape[-1])[used]
