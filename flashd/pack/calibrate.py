"""Runs sample text through a model while it is packed, layer by layer, to learn which neurons matter.

What comes of it decides only which groups are pinned first, and so how often a draft that has only those is
right. Answers do not depend on it.
"""

from __future__ import annotations

import os
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from flashd.bundle.layout import Model
from flashd.bundle.rows import BLOCK, Floats
from flashd.pack import graphs
from flashd.pack.weights import Ffn, Matrix, Weights
from flashd.session import open_session, start_pool

TOKENS = 384
"""Sample tokens. Twice as many move a group's rank by little and cost twice the time."""

ROWS_AT_ONCE = 2048


def sample_tokens(tokenizer_json: bytes) -> npt.NDArray[np.int64]:
    """The first tokens of the sample text that ships with flashd."""
    text = files("flashd.pack").joinpath("sample.txt").read_text("utf-8")
    ids = Tokenizer.from_buffer(tokenizer_json).encode(text, add_special_tokens=False).ids
    return np.array(ids[:TOKENS], np.int64)


class Calibration:
    """The sample's hidden states [T, H], one layer further with each call of `layer`.

    Between the products with the source's own matrices run the graphs that the engine runs there, so that every
    family is followed.
    """

    def __init__(self, weights: Weights, model: Model, rope: Floats, tokens: npt.NDArray[np.int64]) -> None:
        self._weights, self._model = weights, model
        start_pool(len(os.sched_getaffinity(0)))
        self._stages = {name: open_session(graph) for name, graph in graphs.stages(model).items()}
        self._activations = open_session(graphs.activations(model))
        t = np.arange(len(tokens))
        self._attended: dict[str, npt.NDArray[np.generic]] = {
            "last": np.array([len(t) - 1], np.int32), "total": np.array(len(t), np.int32),
            "positions": t[None], "bias": np.zeros((1, 1, len(t), len(t)), np.float32),
        }  # fmt: skip
        for i, (angle, length) in enumerate(rope):
            self._attended[f"cos.{i}"] = (length * np.cos(t[:, None] * angle)).astype(np.float32)
            self._attended[f"sin.{i}"] = (length * np.sin(t[:, None] * angle)).astype(np.float32)
        cache = np.zeros((1, model.kv_heads, len(t), model.head_dim), np.float32)
        self._attended |= {"past_key": cache, "past_value": cache}
        self._x: Floats = weights.embedding().rows(tokens) * np.float32(model.embedding_scale)
        if model.positions:
            self._x = self._x + weights.positions().rows(t)

    def layer(self, i: int) -> npt.NDArray[np.int64]:
        """Takes the sample through layer i.

        Returns the numbers of its groups, or in a mixture those of its experts, the hottest first.
        """
        vectors = self._weights.layer_vectors(i)
        (h,) = self._run("graph.enter", vectors, x=self._x)
        qkv = np.concatenate([_product(h, part) for part in self._weights.qkv(i)], axis=1)
        kind = self._model.layer_kinds[i]
        heads, *_ = self._run(f"graph.attention.{kind}", vectors, qkv=qkv[None], **self._attended)
        branch = _product(heads[0], self._weights.output(i))
        x, h = self._run("graph.middle", vectors, x=self._x, h=h, branch=branch)
        experts = self._model.experts
        if experts:
            y, order = self._mixture(i, h, self._x if experts.early else h)
        else:
            a, down = self._neurons(self._weights.ffns(i)[0], h)
            y, order = a @ down.T, self._hottest_first(a, down)
            if self._model.normed_neurons:
                y = np.concatenate([y, (a * a).sum(1, keepdims=True)], axis=1)
        (self._x,) = self._run("graph.leave", vectors, x=x, branch=y)
        return order

    def _mixture(self, i: int, h: Floats, routed: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
        """(the FFN's output [T, H], its experts by how many tokens use them) of what it and its router take."""
        scores = _product(routed, self._weights.router(i))
        used, weights = self._run("graph.route", {}, scores=scores)  # [T, used] each
        uses = np.bincount(used.astype(np.int64).reshape(-1), minlength=scores.shape[1])
        y, ffns = np.zeros_like(h), self._weights.ffns(i)
        for expert in np.flatnonzero(uses).tolist():
            tokens, place = np.nonzero(used == expert)
            a, down = self._neurons(ffns[expert], h[tokens])
            y[tokens] += weights[tokens, place, None] * (a @ down.T)
        return y, np.argsort(-uses, kind="stable")

    def _neurons(self, ffn: Ffn, h: Floats) -> tuple[Floats, Floats]:
        """Activations [T, F] of an FFN's neurons, and their columns [H, F]."""
        products = np.stack([_product(h, part) for part in ffn.inputs], axis=2)  # [T, F, M]
        feed = {"products": products.reshape(len(h), -1), "bias": ffn.biases.reshape(-1)}
        known = [part.name for part in self._activations.get_inputs()]
        (a,) = self._activations.run(None, {name: feed[name] for name in known})
        return np.asarray(a, np.float32), ffn.down.rows()

    def _run(self, stage: str, vectors: dict[str, Floats], **values: npt.NDArray[np.generic]) -> list[Floats]:
        session = self._stages[stage]
        return list(session.run(None, {i.name: (values | vectors)[i.name] for i in session.get_inputs()}))

    def _hottest_first(self, a: Floats, down: Floats) -> npt.NDArray[np.int64]:
        """Groups by the mean size of their neurons' shares in the output, |activation| x |down column|."""
        size = np.abs(a).mean(0) * np.linalg.norm(down, axis=0)  # [F]
        size = np.pad(size, (0, self._model.neurons - len(size)))
        return np.argsort(-size.reshape(-1, BLOCK).sum(1), kind="stable")


def _product(x: Floats, matrix: Matrix) -> Floats:
    """x [T, K] times a matrix of the file [n, K], some rows at a time."""
    starts = range(0, len(matrix), ROWS_AT_ONCE)
    return np.concatenate([x @ matrix.rows(slice(at, at + ROWS_AT_ONCE)).T for at in starts], axis=1)
