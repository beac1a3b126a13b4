"""Runs sample text through a model while it is packed, layer by layer, to learn which neurons matter.

The result decides which groups are pinned first, and so how often a draft made from these alone is right. If neurons
are selected, it also decides which take part.
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
from flashd.bundle.layer_kinds import AttentionKind, LayerKind, Recurrent
from flashd.bundle.reader import dequantise
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import BLOCK, Floats
from flashd.bundle.tokenizer_json import ids_of
from flashd.graphs.kinds.latent import rows_given
from flashd.graphs.kinds.recurrent import rows_shape, sums_shape
from flashd.graphs.layer_stages import NEVER
from flashd.graphs.products import activations, gates
from flashd.graphs.stages import stages
from flashd.pack.rounding.rows import encode_rows
from flashd.pack.weights.matrix import Matrix
from flashd.pack.weights.weights import Ffn, Weights
from flashd.system.onnx_session import open_session, start_pool

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

TOKENS = 384
"""Tokens of the sample text. Twice as many hardly change the order of groups and take twice the time."""

ROWS_AT_ONCE = 2048
"""Rows of a matrix that are read from the file together."""


def sample_tokens(tokenizer_json: bytes) -> Numbers:
    """[n]: the first TOKENS tokens of the sample text that ships with flashd."""
    return text_tokens(tokenizer_json, files("flashd.pack").joinpath("sample.txt").read_text("utf-8"))[:TOKENS]


def text_tokens(tokenizer_json: bytes, text: str) -> Numbers:
    """[n]: the tokens of a text, without any that begin or end it."""
    return np.array(ids_of(Tokenizer.from_buffer(tokenizer_json), text), np.int64)


@dataclass(frozen=True)
class Seen:
    """What a layer's FFN computed in the N tokens of all texts, or an expert in the N tokens that use it."""

    h: Floats  # [N, H], its input
    a: Floats  # [N, F], activations, times the expert's weight
    reach: Floats  # [F], the norm of each column of down_proj

    @classmethod
    def nothing(cls, hidden: int, neurons: int) -> Seen:
        """That of an expert that no token uses: N is 0."""
        return cls(*(np.zeros(shape, np.float32) for shape in ((0, hidden), (0, neurons), (neurons,))))

    def sizes(self) -> Floats:
        """[F]: the mean size of each neuron's contribution to the output."""
        return np.asarray(np.abs(self.a).mean(0) * self.reach, np.float32)


Chooses = Callable[[int, Floats], Mask]
"""(expert, h [N, H]) -> which of its neurons [N, F] take part."""

Sees = Callable[[int, Numbers, Seen], None]
"""Called with (expert, numbers [N] of the tokens that use it, ascending, what it computed in them)."""


@dataclass(frozen=True)
class Dense:
    """An FFN's weights in RAM."""

    inputs: list[Floats]  # gate and up, or up alone, each [F, H]
    biases: Floats  # of the input rows, [F, M] or [F, 0]
    down: Floats  # [H, F]

    def part(self, start: int, stop: int | None) -> Dense:
        """Its neurons `start` to `stop`."""
        return Dense([m[start:stop] for m in self.inputs], self.biases[start:stop], self.down[:, start:stop])


Others = Callable[[int], Dense]
"""(expert) -> the weights to compute it with."""


class Calibration:
    """The hidden states [N, H] of some texts. A call of `layer`, `mixture` or `replaced` takes them a layer further.

    The products are made with the source's own weights. Between them run the same graphs as in the engine, so every
    family is computed as the engine computes it.
    """

    def __init__(
        self, weights: Weights, model: Architecture, rope: Sequence[Floats], texts: Sequence[Numbers],
        on_layer: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._weights, self._model, self._rope, self._texts, self._on_layer = weights, model, rope, texts, on_layer
        start_pool(len(os.sched_getaffinity(0)))
        self._stages = {name: open_session(graph) for name, graph in stages(model).items()}
        self._activations = open_session(activations(model))
        self._gates = open_session(gates(model)) if model.gated else None
        # every layer asks for it again, with a window or without, and all texts of a cut have the same length
        self._attended = lru_cache(maxsize=2)(self._attention_feed)
        self._kept: dict[tuple[int, int], list[Floats]] = {}  # keys and values by layer and text, if some borrow them
        tokens = np.concatenate(texts)
        self._x: Floats = weights.embedding().rows(tokens) * np.float32(model.embedding_scale)
        if model.positions:
            places = np.concatenate([np.arange(len(text)) for text in texts])
            self._x = self._x + weights.positions().rows(places)
        self._inputs: Floats | None = None  # [L, N, P]
        if table := weights.token_inputs():
            products = _product(self._x, weights.token_projection())
            rows = table.rows(tokens)
            (self._inputs,) = self._run("token_inputs", weights.model_vectors(), products=products, rows=rows)
        if states := weights.states("stream_projection"):
            (self._x,) = self._run("spread", {}, x=self._x, products=_joined(self._x, states))

    def layer(self, i: int) -> Seen:
        """Takes the texts through layer `i`, which is not a mixture. Nothing is seen if it has no FFN."""
        vectors, x, h = self._attend(i)
        if not self._model.neurons_of(i):
            self._leave(i, vectors, x, np.zeros_like(x))
            return Seen(h, np.zeros((len(h), 0), np.float32), np.zeros(0, np.float32))
        a, down = self._neurons(self._weights.ffns(i)[0], h)  # [N, F], [H, F]
        y = a @ down.T  # [N, H]
        if self._model.normed_neurons:
            y = np.concatenate([y, (a * a).sum(1, keepdims=True)], axis=1)
        self._leave(i, vectors, x, y)
        return Seen(h[:, : self._model.hidden], a, np.linalg.norm(down, axis=0))

    def gates(self, i: int, h: Floats) -> Floats:
        """Activations [N, F] of the gates of layer `i`, which is not a mixture, for h [N, H]."""
        assert self._gates is not None
        (a,) = self._gates.run(None, {"products": _product(h, self._weights.ffns(i)[0].inputs[0])})
        return np.asarray(a, np.float32)

    def mixture(
        self, i: int, chooses: Chooses | None = None, sees: Sees | None = None, columns: RowFormat | None = None,
        others: Others | None = None,
    ) -> Numbers:  # fmt: skip
        """Takes the texts through layer `i` of a mixture. Returns the numbers of the experts, most used first, [E].

        A plain FFN counts as one expert that every token uses, unless its activations are normed. Of a layer without
        experts the order says nothing.

        Args:
            i: the layer.
            chooses: says which neurons of an expert take part; None: all.
            sees: is told what each expert that is used computed.
            columns: the columns of down_proj are rounded to rows of this format; None: they are not.
            others: gives the weights of an expert; None: they are the source's.
        """
        vectors, x, h = self._attend(i)
        h, asks = h[:, : self._model.hidden], h[:, -self._model.hidden :]  # the same, if the router takes h too
        used, weights = self._routed(i, asks)
        uses = np.bincount(used.reshape(-1), minlength=self._model.ffns)
        y, ffns = np.zeros_like(h), self._weights.ffns(i)
        own = self._weights.expert_vectors(i).get("down.bias") if ffns else None
        if leading := self._weights.leading(i):
            a, down = self._neurons(leading, h)
            y += a @ down.T
        for expert in np.flatnonzero(uses).tolist():
            tokens, place = np.nonzero(used == expert)  # [n] each
            taken = h[tokens]  # [n, H]
            if others:
                ffn = others(expert)
                a, down = self.activate(ffn, taken), ffn.down  # [n, F], [H, F]
            else:
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
            if own is not None:
                y[tokens] += weights[tokens, place, None] * own.reshape(len(ffns), -1)[expert]
        self._leave(i, vectors, x, y)
        return np.argsort(-uses, kind="stable")

    def _routed(self, i: int, h: Floats) -> tuple[Numbers, Floats]:
        """(numbers of experts, their weights), [N, used] each, of layer `i`, whose router takes h [N, H].

        The hidden states must still be those in front of the layer.
        """
        experts = self._model.experts
        if experts is None:
            return np.zeros((len(h), 1), np.int64), np.ones((len(h), 1), np.float32)
        if i not in self._model.paged_layers:
            return np.zeros((len(h), 0), np.int64), np.zeros((len(h), 0), np.float32)
        scores = _product(self._x if experts.early else h, self._weights.router(i))
        used, weights = self._run("route", self._weights.expert_vectors(i), scores=scores)
        return used.astype(np.int64), weights

    def _attend(self, i: int) -> tuple[dict[str, Floats], Floats, Floats]:
        """(the vectors of layer `i`, x [N, carried_width] and h [N, ffn_input_width]) behind its attention."""
        vectors = self._weights.layer_vectors(i)
        x, h = self._run("enter", vectors, x=self._x)
        branch = np.zeros_like(h)
        for mixer, (kind, (*inner_parts, (last,))) in zip(
            self._model.mixers(i), self._weights.mixers(i), strict=True
        ):
            given = [p for product, p in zip(mixer.inner, inner_parts, strict=True) if not product.inner]
            inner = np.concatenate([_product(h, part) for parts in given for part in parts], axis=1)
            mixed = [self._mixed(i, kind, n, vectors, inner[part]) for n, part in enumerate(self._parts())]
            branch += _product(np.concatenate(mixed), last)
        others = self._weights.beside(i)
        low = h
        for name in ("laurel_left", "laurel_right"):
            low = _joined(low, others[name]) if name in others else low
        x, h = self._run("middle", vectors, x=x, h=h, branch=branch, low=low)
        if self._model.shared_expert(i):
            a = self._activated([_product(h, part) for part in others["shared_inputs"]], np.zeros(0, np.float32))
            x, h = self._run("beside", vectors, x=x, h=h, branch=_joined(a, others["shared_down"]))
        if self._model.bounds:
            gates = _joined(h, others["bound"]) if "bound" in others else h
            (h,) = self._run(f"bound.{i}", {}, h=h, products=gates)
        return vectors, x, h

    def _mixed(
        self, i: int, kind: LayerKind, text: int, vectors: dict[str, Floats], inner: Floats
    ) -> Floats:  # fmt: skip
        """[n, ...]: what a mixer of layer `i` makes of its products [n, ...] of the tokens of one text."""
        if not isinstance(kind, AttentionKind):
            fresh = self._fresh_state(kind) | {"inner": inner[None], "tokens": np.array([len(inner)])}
            number = self._model.recurrent.index(kind)
            *_, out = self._run(f"recurrent.{number}", vectors, **fresh)  # behind its state
            return np.asarray(out[0], np.float32)
        lender = self._model.lender(i)
        shape = (1, self._model.kv_heads_of(kind), len(inner), self._model.head_dim_of(kind))
        past = self._kept[lender, text] if kind.borrows else [np.zeros(shape, np.float32)] * 2
        feed = {"qkv": inner[None], "past_key": past[0], "past_value": past[1]}
        for product, parts in zip(self._model.products(i), self._weights.products(i), strict=True):
            if product.inner:
                feed[f"{product.name}.w"] = rows_given(product, [part.rows(slice(None)) for part in parts])
        out, *kept = self._run(
            f"attention.{self._model.layer_kinds[i]}", vectors, **feed, **self._attended(len(inner), kind.window)
        )
        if kept and any(each.borrows for each in self._model.attention):
            self._kept[lender, text] = kept
        return np.asarray(out[0], np.float32)

    def _fresh_state(self, kind: Recurrent) -> dict[str, npt.NDArray[np.generic]]:
        """The inputs of a graph that say that no token came before."""
        none, rows, sums = np.zeros(1, np.int64), rows_shape(self._model, kind), sums_shape(kind)
        feed: dict[str, npt.NDArray[np.generic]] = {"past_rows": np.zeros(rows, np.float32)}
        if sums:
            feed |= {"past_sums": np.zeros(sums, np.float32), "pending": none, "folded": none}
        return feed

    def replaced(self, i: int, ffn: Dense) -> None:
        """Takes the texts through layer `i` with other weights in its FFN."""
        vectors, x, h = self._attend(i)
        self._leave(i, vectors, x, self.activate(ffn, h) @ ffn.down.T)

    def _leave(self, i: int, vectors: dict[str, Floats], x: Floats, branch: Floats) -> None:
        """Keeps what leaves layer `i`, of x [N, H] and the FFN's output."""
        self._x, gating = self._run("leave", vectors, x=x, branch=branch)
        if self._inputs is not None:
            (gate,), (out,) = self._weights.products_behind(i)
            (y,) = self._run("token_gate", vectors, products=_product(gating, gate), token=self._inputs[i])
            (self._x,) = self._run("token_leave", vectors, x=self._x, branch=_product(y, out))
        self._on_layer(i + 1)

    @property
    def states(self) -> Floats:
        """[N, stream_width]: the hidden states behind the last layer that the texts were taken through."""
        return self._x

    def perplexity(self) -> float:
        """The perplexity of the texts. Call this when they were taken through all layers."""
        lost, counted = 0.0, 0
        for rows, following in self.pieces(self._model.context):
            logits = self.logits(rows)
            logits = logits - logits.max(1, keepdims=True)
            said = logits[np.arange(len(logits)), following]
            lost += float((np.log(np.exp(logits).sum(1)) - said).sum())
            counted += len(logits)
        return float(np.exp(lost / counted))

    def pieces(self, most: int) -> Iterator[tuple[slice, Numbers]]:
        """Up to `most` tokens of a text at a time: (their rows in `states`, the tokens [n] that follow each)."""
        for part, text in zip(self._parts(), self._texts, strict=True):
            for at in range(0, len(text) - 1, most):
                following = text[at + 1 : at + 1 + most]
                yield slice(part.start + at, part.start + at + len(following)), following

    def logits(self, rows: slice) -> Floats:
        """Logits [n, V] behind some tokens, when the texts were taken through all layers."""
        return self.head(self.finished(rows))

    def finished(self, rows: slice) -> Floats:
        """What the head takes [n, H] of some tokens, once the last layer is done."""
        x, matrices = self._x[rows], self._weights.states("stream_out")
        states = np.split(x, len(matrices) + 1, axis=1)[1:]
        products = [_product(state, matrix) for state, matrix in zip(states, matrices, strict=True)]
        more = {"products": np.concatenate(products, axis=1)} if products else {}
        return self._run("finish", self._weights.model_vectors(), x=x, **more)[0]

    def head(self, h: Floats) -> Floats:
        """h [n, H] -> logits [n, V]."""
        logits = _product(h, self._weights.head())
        if "logits" not in self._stages:
            return logits
        return self._run("logits", self._weights.model_vectors(), x=logits)[0]

    def _parts(self) -> Iterator[slice]:
        """The rows of each text in `states`."""
        ends = np.cumsum([len(text) for text in self._texts])
        return (slice(int(end) - len(text), int(end)) for end, text in zip(ends, self._texts, strict=True))

    def _attention_feed(self, n: int, window: int) -> dict[str, npt.NDArray[np.generic]]:
        """The inputs of the attention graph for a text of n tokens, without queries, keys and values.

        `window`: each token attends to the last so many; 0: to all.
        """
        t = np.arange(n)
        unseen = (t[None] > t[:, None]) | (t[None] <= t[:, None] - (window or n))  # [n, n]
        feed: dict[str, npt.NDArray[np.generic]] = {
            "last": np.array([n - 1], np.int32),
            "positions": t[None], "bias": np.where(unseen, NEVER, np.float32(0))[None, None],
        }  # fmt: skip
        for i, (angle, length) in enumerate(self._rope):
            feed[f"cos.{i}"] = (length * np.cos(t[:, None] * angle)).astype(np.float32)
            feed[f"sin.{i}"] = (length * np.sin(t[:, None] * angle)).astype(np.float32)
        return feed

    def _neurons(self, ffn: Ffn, h: Floats) -> tuple[Floats, Floats]:
        """(activations [N, F] of an FFN's neurons for h [N, H or ffn_input_width], their columns [H, F])."""
        h, bounds = h[:, : self._model.hidden], h[:, self._model.hidden :]
        return self._activated([_product(h, part) for part in ffn.inputs], ffn.biases, bounds), ffn.columns()

    def activate(self, ffn: Dense, h: Floats) -> Floats:
        """Activations [N, F] of an FFN's neurons for h [N, ffn_input_width]."""
        h, bounds = h[:, : self._model.hidden], h[:, self._model.hidden :]
        return self._activated([h @ part.T for part in ffn.inputs], ffn.biases, bounds)

    def _activated(self, products: list[Floats], biases: Floats, bounds: Floats | None = None) -> Floats:
        """Activations [N, F] from the products [N, F] of h with each of the M input matrices."""
        feed = {"products": np.stack(products, axis=2).reshape(len(products[0]), -1), "bias": biases.reshape(-1)}
        feed |= {} if bounds is None else {"bounds": bounds}
        known = [part.name for part in self._activations.get_inputs()]
        (a,) = self._activations.run(None, {name: feed[name] for name in known})
        return np.asarray(a, np.float32)

    def _run(self, stage: str, vectors: dict[str, Floats], **values: npt.NDArray[np.generic]) -> list[Floats]:
        session = self._stages[stage]
        return list(session.run(None, {i.name: (values | vectors)[i.name] for i in session.get_inputs()}))


def hottest(sizes: Floats, whole: bool) -> Numbers:
    """[F]: a layer's neurons in the card's order. Those that contribute most to the output come first.

    32 neurons become a group. If neurons and not groups of the source are sorted, the hottest third of
    Qwen2.5-Coder-1.5B makes a draft's first guess right in 57 % of cases and not 50 %, one of its first three in 75 %
    and not 66 %.

    Args:
        sizes: the size of each neuron's contribution to the output, [F], see Seen.
        whole: whether the source's own groups, whose columns share a grid, stay together.

    Neurons that only fill the last group come last, or stay in their group if `whole`.
    """
    sizes = np.pad(sizes, (0, -len(sizes) % BLOCK))
    if not whole:
        return np.argsort(-sizes, kind="stable")
    return neurons_of(np.argsort(-sizes.reshape(-1, BLOCK).sum(1), kind="stable"))


def neurons_of(groups: Numbers) -> Numbers:
    """[32 n]: the neurons of the source's groups `groups` [n], in the groups' order."""
    return (groups[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)


def _joined(x: Floats, matrices: Sequence[Matrix]) -> Floats:
    """x [T, K] times matrices of the file -> [T, n of all]."""
    return np.concatenate([_product(x, matrix) for matrix in matrices], axis=1)


def _product(x: Floats, matrix: Matrix) -> Floats:
    """x [T, K] times a matrix of the file [n, K] -> [T, n]. The rows are read some at a time."""
    starts = range(0, len(matrix), ROWS_AT_ONCE)
    return np.concatenate([x @ matrix.rows(slice(at, at + ROWS_AT_ONCE)).T for at in starts], axis=1)
