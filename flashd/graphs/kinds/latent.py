"""Attention whose heads look at one short row of each token, see bundle.layer_kinds.Latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import Latent, LayerProduct
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import T

Multiply = Callable[[str, LayerProduct], str]
"""(input [1, T, ...], product) -> [1, T, rows]"""


class LatentStages:
    """Adds what stands around the attention of such a layer to a graph.

    Args:
        multiply: adds the products that take what others made.
        turned: turns (x [1, T, heads D], heads).
    """

    def __init__(
        self, g: Graph, model: Architecture, latent: Latent, vector: Vector, multiply: Multiply,
        turned: Callable[[str, int], str],
    ) -> None:  # fmt: skip
        self._g, self._model, self._latent = g, model, latent
        self._vector, self._multiply, self._turned = vector, multiply, turned
        self._products = {p.name: p for p in latent.products(model.hidden, model.heads)}

    def apart(self, made: str) -> tuple[str, str]:
        """What latent_in made [1, T, ...] -> queries [1, T, heads row] and the row [1, T, row] that is kept."""
        g, latent, heads = self._g, self._latent, self._model.heads
        first, last = g.nodes_out("Split", made, g.shape(*self._products["latent_in"].parts), outputs=2, axis=2)
        if latent.query_rank:
            normed = self._normed(first, "query_latent_norm", latent.query_rank)
            first = self._multiply(normed, self._products["latent_query"])
        fixed, turned = g.nodes_out("Split", first, g.shape(*latent.query_widths(heads)), outputs=2, axis=2)
        parts = [
            g.node("Reshape", part, g.shape(0, 0, heads, -1))
            for part in (self._multiply(fixed, self._products["latent_key"]), self._turned(turned, heads))
        ]
        queries = g.node("Reshape", g.node("Concat", *parts, axis=3), g.shape(0, 0, -1))
        c, r = g.nodes_out("Split", last, g.shape(latent.rank, latent.turned), outputs=2, axis=2)
        return queries, g.node("Concat", self._normed(c, "latent_norm", latent.rank), self._turned(r, 1), axis=2)

    def seen(self, out: str) -> str:
        """What the heads saw of rows [1, T, heads row] -> their values [1, T, heads values]."""
        g, latent = self._g, self._latent
        by_head = g.node("Reshape", out, g.shape(0, 0, self._model.heads, latent.row))
        c = g.node("Slice", by_head, g.shape(0), g.shape(latent.rank), g.shape(3))
        return self._multiply(g.node("Reshape", c, g.shape(0, 0, -1)), self._products["latent_value"])

    def _normed(self, x: str, name: str, width: int) -> str:
        return self._g.rms_norm(x, self._vector(f"{name}.weight", width), self._model.norm_epsilon)


def given(g: Graph) -> Multiply:
    """Products whose rows are inputs of the graph: for each head [K, n], by the product's name."""

    def multiply(x: str, product: LayerProduct) -> str:
        heads = product.heads
        rows = g.input(f"{product.name}.w", T.FLOAT, [heads, product.width, product.rows // heads])
        split = g.node("Transpose", g.node("Reshape", x, g.shape(0, 0, heads, -1)), perm=[0, 2, 1, 3])
        return g.node(
            "Reshape", g.node("Transpose", g.node("MatMul", split, rows), perm=[0, 2, 1, 3]), g.shape(0, 0, -1)
        )

    return multiply


def rows_given(product: LayerProduct, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows [n, K] of a product's matrices, as `given` takes them."""
    by_head = np.concatenate(rows).reshape(product.heads, -1, product.width)
    return np.ascontiguousarray(by_head.swapaxes(1, 2))
