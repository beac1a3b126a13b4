"""Checks that a model file's tensors have the shapes that its metadata says, before anything is computed."""

from __future__ import annotations

from pathlib import Path

from flashd.bundle.architecture import Architecture
from flashd.bundle.rows.kinds import BLOCK
from flashd.errors import DataError
from flashd.pack.weights.weights import Ffn, Weights

MOST_HEADS = 4096


def check_heads(model: Architecture, path: Path) -> None:
    """Raises DataError where a file claims more heads than any model has, before a row is numbered for each."""
    if not 1 <= model.kv_heads <= model.heads <= MOST_HEADS:
        raise DataError(f"{path}: {model.heads} heads, {model.kv_heads} of keys; 1 to {MOST_HEADS} are possible")


def check_shapes(weights: Weights, model: Architecture) -> None:
    """Raises DataError if a matrix is missing or has another shape than the model needs."""
    m = model
    if m.heads % max(1, m.kv_heads) or m.kv_heads < 1:
        raise DataError(f"{m.heads} heads cannot share {m.kv_heads} key-value heads")
    for name, matrix in (("the embeddings", weights.embedding()), ("the head", weights.head())):
        _check(name, (len(matrix), matrix.width), (m.vocabulary, m.hidden))
    if table := weights.token_inputs():
        _check("the token inputs", (len(table), table.width), (m.vocabulary, m.token_width))
        projection = weights.token_projection()
        _check(projection.tensor.name, (len(projection), projection.width), (m.token_width, m.hidden))
    for state in (*weights.states("stream_projection"), *weights.states("stream_out")):
        _check(state.tensor.name, (len(state), state.width), (m.hidden, m.hidden))
    for i in range(m.layers):
        known, found = [*m.products(i), *m.products_behind()], [*weights.products(i), *weights.products_behind(i)]
        for product, matrices in zip(known, found, strict=True):
            for part, rows in zip(matrices, product.parts, strict=True):
                _check(part.tensor.name, (len(part), part.width), (rows, product.width))
        if m.experts and i in m.paged_layers:
            router = weights.router(i)
            _check(router.tensor.name, (len(router), router.width), (m.experts.count, m.hidden))
        for ffn in weights.ffns(i):
            _check_ffn(ffn, m, m.neurons_of(i) // m.ffns)
        stated, leading = m.leading_ffn(i), weights.leading(i)
        if stated and leading:
            _check_ffn(leading, m, stated.neurons)


def _check_ffn(ffn: Ffn, m: Architecture, filled: int) -> None:
    neurons, name = ffn.down.shape[-1], ffn.down.name
    _check(name, ffn.down.shape, (m.hidden, neurons))
    if -(-neurons // BLOCK) * BLOCK != filled:
        raise DataError(f"tensor {name!r} has {neurons} neurons, but the model needs {filled}")
    for part in ffn.inputs:
        _check(part.tensor.name, (len(part), part.width), (neurons, m.hidden))


def _check(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted or 0 in wanted:
        raise DataError(f"tensor {name!r} has the shape {found}, but the model needs {wanted}")
