"""Several hidden states of a token side by side, see bundle.layer_kinds.Streams.

They stand one behind the other in the last axis, [..., T, S H]. All of it is computed token by token.
"""

from __future__ import annotations

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.graphs.nodes import Graph, Vector

LEAST_SQUARE = 1e-5
"""Of a state that is made as long as another, the least mean square that it is divided by (modeling_gemma3n.py)."""

END = 1 << 30
"""As where a slice stops: it goes on to the end."""


def first(g: Graph, model: Architecture, x: str) -> str:
    """[..., H]: the first H numbers of x [..., n]."""
    return g.node("Slice", x, g.shape(0), g.shape(model.hidden), g.shape(-1))


def behind(g: Graph, model: Architecture, x: str) -> str:
    """[..., n - H]: what follows these."""
    return g.node("Slice", x, g.shape(model.hidden), g.shape(END), g.shape(-1))


def predicted(g: Graph, model: Architecture, x: str, vector: Vector) -> str:
    """[..., T, S H]: the states that a layer predicts of x [..., T, S H]."""
    count = _count(model)
    weights = _matrix(g, vector, "stream_predict", count**2, count)
    mixed = g.node("MatMul", _routed(g, model, first(g, model, x), vector), weights)
    states = g.node("Reshape", x, g.shape(-1, count, model.hidden))
    added = g.node("MatMul", g.node("Reshape", mixed, g.shape(-1, count, count)), states)
    return g.node("Reshape", g.node("Add", states, added), g.node("Shape", x))


def corrected(g: Graph, model: Architecture, predictions: str, y: str, vector: Vector) -> str:
    """[..., T, S H]: the states behind a layer, of those that it predicted and of what it computed, y [..., T, H]."""
    count = _count(model)
    weights = _matrix(g, vector, "stream_correct", count, count)
    shares = g.node("MatMul", _routed(g, model, y, vector), weights)
    shares = g.node("Add", g.node("Reshape", shares, g.shape(-1, count, 1)), g.constant(np.float32(1)))
    news = g.node("Reshape", g.node("Sub", y, first(g, model, predictions)), g.shape(-1, 1, model.hidden))
    states = g.node("Reshape", predictions, g.shape(-1, count, model.hidden))
    added = g.node("Add", states, g.node("Mul", news, shares))
    return g.node("Reshape", added, g.node("Shape", predictions))


def told(g: Graph, model: Architecture, x: str, branch: str) -> str:
    """x [..., T, S H] with branch [..., T, H] added to all states but the first."""
    return g.node("Concat", first(g, model, x), _added(g, model, behind(g, model, x), branch), axis=-1)


def spread(g: Graph, model: Architecture, x: str, products: str) -> str:
    """[..., T, S H]: the states in front of the layers, of embeddings x [..., T, H] and their products."""
    return g.node("Concat", x, _as_long(g, model, products, x), axis=-1)


def merged(g: Graph, model: Architecture, x: str, products: str) -> str:
    """[..., T, H]: the mean of the first of the states x [..., T, S H], and of the products of the others."""
    state, count = first(g, model, x), _count(model)
    total = state
    for other in g.nodes_out(
        "Split", _as_long(g, model, products, state), outputs=count - 1, axis=-1, num_outputs=count - 1
    ):
        total = g.node("Add", total, other)
    return g.node("Mul", total, g.constant(np.float32(1 / count)))


def _count(model: Architecture) -> int:
    assert model.streams
    return model.streams.count


def _routed(g: Graph, model: Architecture, y: str, vector: Vector) -> str:
    """m(y) [..., T, S] of y [..., T, H]."""
    normed = g.rms_norm(y, vector("stream_norm.weight", model.hidden), model.norm_epsilon)
    return g.node("Tanh", g.node("MatMul", normed, _matrix(g, vector, "stream_router", _count(model), model.hidden)))


def _matrix(g: Graph, vector: Vector, name: str, rows: int, width: int) -> str:
    """[width, rows] of a matrix [rows, width] that is among the layer's vectors."""
    values = g.node("Reshape", vector(f"{name}.weight", rows * width), g.shape(rows, width))
    return g.node("Transpose", values, perm=[1, 0])


def _as_long(g: Graph, model: Architecture, products: str, like: str) -> str:
    """products [..., T, (S - 1) H], each state of which is made as long as `like` [..., T, H]."""
    states = g.node("Reshape", products, g.shape(-1, _count(model) - 1, model.hidden))
    least = g.constant(np.float32(LEAST_SQUARE))
    own = g.node("Sqrt", g.node("Max", _mean_square(g, states), least))  # [n, S - 1, 1]
    length = g.node("Reshape", g.node("Sqrt", _mean_square(g, like)), g.shape(-1, 1, 1))
    return g.node("Reshape", g.node("Div", g.node("Mul", states, length), own), g.node("Shape", products))


def _mean_square(g: Graph, x: str) -> str:
    return g.node("ReduceMean", g.node("Mul", x, x), g.shape(-1), keepdims=1)


def _added(g: Graph, model: Architecture, states: str, branch: str) -> str:
    """States [..., T, (S - 1) H] with branch [..., T, H] added to each."""
    apart = g.node("Reshape", states, g.shape(-1, _count(model) - 1, model.hidden))
    one = g.node("Reshape", branch, g.shape(-1, 1, model.hidden))
    return g.node("Reshape", g.node("Add", apart, one), g.node("Shape", states))
