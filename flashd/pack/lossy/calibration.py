"""Runs sample text through a model while it is packed, layer by layer, to learn which neurons matter.

What comes of it decides which groups are pinned first, and so how often a draft that has only those is right; where
neurons are selected, also which take part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from flashd.bundle.architecture import Architecture
from flashd.bundle.formats import RowFormat
from flashd.bundle.reader import dequantise
from flashd.bundle.row_kinds import BLOCK, Floats
from flashd.bundle.tokenizer_json import ids_of
from flashd.pack.graphs.products import activations, gates
from flashd.pack.graphs.stages import stages
from flashd.pack.rounding.rows import encode_rows
from flashd.pack.weights import Ffn, Matrix, Weights
from flashd.system.onnx_session import open_session, start_pool

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

TOKENS = 384
"""Sample tokens. Twice as many move a group's rank by little and cost twice the time."""

ROWS_AT_ONCE = 2048


def sample_tokens(tokenizer_json: bytes) -> Numbers:
    """The first tokens of the sample text that ships with flashd."""
    return text_tokens(tokenizer_json, files("flashd.pack").joinpath("sample.txt").read_text("utf-8"))[:TOKENS]


def text_tokens(tokenizer_json: bytes, text: str) -> Numbers:
    return np.array(ids_of(Tokenizer.from_buffer(tokenizer_json), text), np.int64)


@dataclass(frozen=True)
class Seen:
    """What a layer's FFN did in the N tokens of all texts, or an expert in those that were routed to it."""

    h: Floats  # [N, H], what went in
    a: Floats  # [N, F] activations, times the expert's weight
    reach: Floats  # [F], the length of each column of down_proj

    @classmethod
    def nothing(cls, hidden: int, neurons: int) -> Seen:
        """Of an expert that no token was routed to."""
        return cls(*(np.zeros(shape, np.float32) for shape in ((0, hidden), (0, neurons), (neurons,))))

    def sizes(self) -> Floats:
        """[F]: the mean size of each neuron's share in the output."""
        return np.asarray(np.abs(self.a).mean(0) * self.reach, np.float32)


Chooses = Callable[[int, Floats], Mask]
"""(expert, h [N, H]) -> which of its neurons [N, F] take part."""

Sees = Callable[[int, Numbers, Seen], None]
"""Called with (expert, the numbers [N] of the tokens that use it, ascending, what it did in them)."""


@dataclass(frozen=True)
class Dense:
    """An FFN's weights in RAM."""

    inputs: list[Floats]  # gate and up, or up alone, each [F, H]
    biases: Floats  # of the input rows, [F, M] or [F, 0]
    down: Floats  # [H, F]

    def part(self, start: int, stop: int | None) -> Dense:
        """Some of its neurons."""
        return Dense([m[start:stop] for m in self.inputs], self.biases[start:stop], self.down[:, start:stop])


class Calibration:
    """The hidden states [N, H] of some texts, one layer further with each call of `layer`.

    Between the products with the source's own matrices run the graphs that the engine runs there, so that every
    family is followed.
    """

    def __init__(self, weights: Weights, model: Architecture, rope: Floats, texts: Sequence[Numbers]) -> None:
        self._weights, self._model, self._rope, self._texts = weights, model, rope, texts
        start_pool(len(os.sched_getaffinity(0)))
        self._stages = {name: open_session(graph) for name, graph in stages(model).items()}
        self._activations = open_session(activations(model))
        self._gates = open_session(gates(model)) if model.gated else None
        # every layer asks for it again, and texts of one cut are of one length
        self._attended = lru_cache(maxsize=1)(self._attention_feed)
        tokens = np.concatenate(texts)
        self._x: Floats = weights.embedding().rows(tokens) * np.float32(model.embedding_scale)
        if model.positions:
            places = np.concatenate([np.arange(len(text)) for text in texts])
            self._x = self._x + weights.positions().rows(places)

    def layer(self, i: int) -> Seen:
        """Takes the texts through layer i, which is no mixture."""
        vectors, x, h = self._attend(i)
        a, down = self._neurons(self._weights.ffns(i)[0], h)  # [N, F], [H, F]
        y = a @ down.T
        if self._model.normed_neurons:
            y = np.concatenate([y, (a * a).sum(1, keepdims=True)], axis=1)
        (self._x,) = self._run("graph.leave", vectors, x=x, branch=y)
        return Seen(h, a, np.linalg.norm(down, axis=0))

    def gates(self, i: int, h: Floats) -> Floats:
        """Activations [N, F] of the gates of layer i, which is no mixture, for h [N, H]."""
        assert self._gates is not None
        (a,) = self._gates.run(None, {"products": _product(h, self._weights.ffns(i)[0].inputs[0])})
        return np.asarray(a, np.float32)

    def mixture(
        self, i: int, chooses: Chooses | None = None, sees: Sees | None = None, columns: RowFormat | None = None
    ) -> Numbers:
        """Takes the texts through layer i, of experts; returns their numbers, those that most tokens use first.

        A plain FFN, but for one whose activations are normed, is one expert that every token uses. With `columns`
        those of down_proj are rounded to rows of that format.
        """
        vectors, x, h = self._attend(i)
        used, weights = self._routed(i, h)
        uses = np.bincount(used.reshape(-1), minlength=self._model.ffns)
        y, ffns = np.zeros_like(h), self._weights.ffns(i)
        for expert in np.flatnonzero(uses).tolist():
            tokens, place = np.nonzero(used == expert)
            taken = h[tokens]
            a, down = self._neurons(ffns[expert], taken)
            a *= weights[tokens, place, None]
            if chooses:
                a *= chooses(expert, taken)
            if sees:
                sees(expert, tokens, Seen(taken, a, np.linalg.norm(down, axis=0)))
            if columns:
                written = columns.views(encode_rows(np.ascontiguousarray(down.T), columns))
                down = dequantise(written, columns.kind).T
            y[tokens] += a @ down.T
        (self._x,) = self._run("graph.leave", vectors, x=x, branch=y)
        return np.argsort(-uses, kind="stable")

    def _routed(self, i: int, h: Floats) -> tuple[Numbers, Floats]:
        """(experts, their weights), [N, used] each, of a layer whose FFN takes h; x is not behind it yet."""
        experts = self._model.experts
        if experts is None:
            return np.zeros((len(h), 1), np.int64), np.ones((len(h), 1), np.float32)
        scores = _product(self._x if experts.early else h, self._weights.router(i))
        used, weights = self._run("graph.route", {}, scores=scores)
        return used.astype(np.int64), weights

    def _attend(self, i: int) -> tuple[dict[str, Floats], Floats, Floats]:
        """(the layer's vectors, x and h) behind its attention."""
        vectors = self._weights.layer_vectors(i)
        (h,) = self._run("graph.enter", vectors, x=self._x)
        qkv = np.concatenate([_product(h, part) for part in self._weights.qkv(i)], axis=1)
        kind = self._model.layer_kinds[i]
        heads = [
            self._run(
                f"graph.attention.{kind}", vectors, qkv=qkv[None, part], **self._attended(part.stop - part.start)
            )[0][0]
            for part in self._parts()
        ]
        branch = _product(np.concatenate(heads), self._weights.output(i))
        x, h = self._run("graph.middle", vectors, x=self._x, h=h, branch=branch)
        return vectors, x, h

    def replaced(self, i: int, ffn: Dense) -> None:
        """Takes the texts through layer i with other weights in its FFN."""
        vectors, x, h = self._attend(i)
        (self._x,) = self._run("graph.leave", vectors, x=x, branch=self.activate(ffn, h) @ ffn.down.T)

    @property
    def states(self) -> Floats:
        """[N, H] behind the last layer that the texts were taken through."""
        return self._x

    def perplexity(self) -> float:
        """Of the texts, behind the last layer."""
        lost, counted = 0.0, 0
        for rows, following in self.pieces(self._model.context):
            logits = self.logits(rows)
            logits = logits - logits.max(1, keepdims=True)
            said = logits[np.arange(len(logits)), following]
            lost += float((np.log(np.exp(logits).sum(1)) - said).sum())
            counted += len(logits)
        return float(np.exp(lost / counted))

    def pieces(self, most: int) -> Iterator[tuple[slice, Numbers]]:
        """Up to `most` tokens of a text at a time, with the tokens that follow each."""
        for part, text in zip(self._parts(), self._texts, strict=True):
            for at in range(0, len(text) - 1, most):
                following = text[at + 1 : at + 1 + most]
                yield slice(part.start + at, part.start + at + len(following)), following

    def logits(self, rows: slice) -> Floats:
        """Logits [n, V] behind some tokens, once the last layer is done."""
        return self.head(self.finished(rows))

    def finished(self, rows: slice) -> Floats:
        """What the head takes [n, H] of some tokens, once the last layer is done."""
        return self._run("graph.finish", self._weights.model_vectors(), x=self._x[rows])[0]

    def head(self, h: Floats) -> Floats:
        """h [n, H] -> logits [n, V]."""
        logits = _product(h, self._weights.head())
        if "graph.logits" not in self._stages:
            return logits
        return self._run("graph.logits", self._weights.model_vectors(), x=logits)[0]

    def _parts(self) -> Iterator[slice]:
        """The rows of each text."""
        ends = np.cumsum([len(text) for text in self._texts])
        return (slice(int(end) - len(text), int(end)) for end, text in zip(ends, self._texts, strict=True))

    def _attention_feed(self, n: int) -> dict[str, npt.NDArray[np.generic]]:
        """What attention within a text of n tokens takes beside queries, keys and values."""
        t, kept = np.arange(n), np.zeros((1, self._model.kv_heads, n, self._model.head_dim), np.float32)
        feed: dict[str, npt.NDArray[np.generic]] = {
            "last": np.array([n - 1], np.int32), "total": np.array(n, np.int32),
            "positions": t[None], "bias": np.zeros((1, 1, n, n), np.float32),
            "past_key": kept, "past_value": kept,
        }  # fmt: skip
        for i, (angle, length) in enumerate(self._rope):
            feed[f"cos.{i}"] = (length * np.cos(t[:, None] * angle)).astype(np.float32)
            feed[f"sin.{i}"] = (length * np.sin(t[:, None] * angle)).astype(np.float32)
        return feed

    def _neurons(self, ffn: Ffn, h: Floats) -> tuple[Floats, Floats]:
        """Activations [N, F] of an FFN's neurons, and their columns [H, F]."""
        return self._activated([_product(h, part) for part in ffn.inputs], ffn.biases), ffn.down.rows()

    def activate(self, ffn: Dense, h: Floats) -> Floats:
        """Activations [N, F] of an FFN's neurons for h [N, H]."""
        return self._activated([h @ part.T for part in ffn.inputs], ffn.biases)

    def _activated(self, products: list[Floats], biases: Floats) -> Floats:
        """[N, F], from h's products with each of the input matrices, [N, F] too."""
        feed = {"products": np.stack(products, axis=2).reshape(len(products[0]), -1), "bias": biases.reshape(-1)}
        known = [part.name for part in self._activations.get_inputs()]
        (a,) = self._activations.run(None, {name: feed[name] for name in known})
        return np.asarray(a, np.float32)

    def _run(self, stage: str, vectors: dict[str, Floats], **values: npt.NDArray[np.generic]) -> list[Floats]:
        session = self._stages[stage]
        return list(session.run(None, {i.name: (values | vectors)[i.name] for i in session.get_inputs()}))


def hottest(sizes: Floats, model: Architecture, whole: bool) -> Numbers:
    """A layer's neurons in the card's order, the largest shares in the output first.

    32 of them become a group. Neuron by neuron the hottest third of Qwen2.5-Coder-1.5B makes a draft's first guess
    right in 57 % and not 50 % of cases, one of its first three in 75 and not 66 %.

    Args:
        sizes: each neuron's share in the output, [F], see Seen.
        whole: the source's own groups, whose columns share a grid, stay together.

    Neurons that only fill the last group come last, or in their group.
    """
    sizes = np.pad(sizes, (0, model.neurons - len(sizes)))
    if not whole:
        return np.argsort(-sizes, kind="stable")
    return neurons_of(np.argsort(-sizes.reshape(-1, BLOCK).sum(1), kind="stable"))


def neurons_of(groups: Numbers) -> Numbers:
    """The numbers of the neurons of some of the source's groups, in the groups' order."""
    return (groups[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)


def _product(x: Floats, matrix: Matrix) -> Floats:
    """x [T, K] times a matrix of the file [n, K], some rows at a time."""
    starts = range(0, len(matrix), ROWS_AT_ONCE)
    return np.concatenate([x @ matrix.rows(slice(at, at + ROWS_AT_ONCE)).T for at in starts], axis=1)
