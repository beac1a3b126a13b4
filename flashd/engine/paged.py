"""The forward pass of a model that does not fit: weights multiplied in place, FFN groups streamed past.

What every token needs (attention, head) and as many groups of bundles as the plan allows stay in RAM in the
bundle's own 4.5 bits a weight. The rest of each layer's FFN comes from the card, read ahead while the layers
before compute, once for a whole chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashd.bundle.layout import STAGES, Model
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import Floats, PlainRows, QuantRows
from flashd.engine import graph
from flashd.engine.card import CardStats, CardStream, gap_bytes, layer_schedule
from flashd.engine.cardspeed import remembered
from flashd.engine.graph import Places
from flashd.engine.kv import KvCache
from flashd.engine.plan import Plan
from flashd.engine.window import Window

Tokens = graph.Tokens
OnStep = Callable[[int, int, int], None]
"""Called as a pass goes on with (layers done, layers in all, card bytes read so far). It may raise to stop."""

DRAFT_VOCABULARY = 32768
"""Tokens among which a draft chooses. BPE numbers its tokens by frequency: the first are nearly all of a text."""

Rows = QuantRows | PlainRows


def silent(done: int, layers: int, nbytes: int) -> None:
    """An OnStep that does nothing."""


@dataclass(frozen=True)
class _Layer:
    """What stays in RAM of one layer."""

    vectors: graph.Vectors
    qkv: Rows  # [q + k + v widths, H]
    output: Rows  # [H, query width]
    pinned: Window


class PagedModel:
    """A bundle under a memory budget. Close it when done.

    Raises DamagedRun, CardError while loading and while it runs.
    """

    def __init__(self, bundle: Bundle, plan: Plan, on_step: OnStep = silent) -> None:
        self._bundle = bundle
        self._model: Model = bundle.header.model
        formats = bundle.header.formats
        graph.use_threads(plan.threads)
        self.cache = KvCache(self._model, plan.context)
        self._attend = graph.Attention(bundle, self.cache)
        self._attention_linear = graph.Linear(bundle.read(f"graph.linear.{formats.attention}"))
        self._head_linear = graph.Linear(bundle.read(f"graph.linear.{formats.head}"), rounded=formats.rounded_head)
        self._ffn = graph.Ffn(bundle.read("graph.ffn"), self._model)
        self._embed = graph.Embedder(bundle)
        self._enter, self._middle, self._leave, self._finish = (graph.Stage(bundle.read(name)) for name in STAGES)
        self._logits = graph.Stage(bundle.read("graph.logits")) if bundle.has("graph.logits") else None
        self._vectors = graph.named(bundle.floats("vectors"), self._model.model_vectors())
        self._head = bundle.rows("head")
        self._likely: Any = self._head[:DRAFT_VOCABULARY]
        self._layers = [self._load_layer(i, plan, on_step) for i in range(self._model.layers)]
        # where attention slides, a branch's slot in the cache would be taken for its place in the text
        self._branches = not any(kind.window for kind in self._model.attention)
        form = bundle.header.group
        missing = [layer.pinned.missing().tolist() for layer in self._layers]
        gap = gap_bytes(remembered(bundle.path))
        self._stream = CardStream(bundle, layer_schedule(missing, form.nbytes, gap), plan.buffers)
        self._passing = Window(form, self._model.groups, plan.passing_groups)
        self._form = form
        self._stream.read_ahead()

    def close(self) -> None:
        self._stream.close()

    @property
    def card(self) -> CardStats:
        return self._stream.stats

    @property
    def hit_rate(self) -> float:
        """The share of groups that a pass finds in RAM."""
        return sum(layer.pinned.used for layer in self._layers) / (len(self._layers) * self._model.groups)

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, parents: Sequence[int] | None = None
    ) -> Floats:
        """Logits [R, V] of the rows `wanted` [R] of a pass over `tokens` [T], which the KV cache keeps.

        Every neuron takes part. With `parents` the tokens are a tree, see graph.Places, which the cache keeps in the
        order given. Raises CardError, DamagedRun; the cache is then as it was before.
        """
        past = self.cache.length
        places = Places.in_tree(past, parents) if parents else Places.in_line(past, len(tokens))
        try:
            x = self._pass(tokens, places, on_step)  # [T, H]
        except BaseException:
            # the next pass starts at the first layer, wherever this one broke off
            self._stream.restart()
            raise
        self.cache.advance(len(tokens))
        return self._said(x[wanted])  # [R, V]

    def draft(self, token: int, most: int) -> list[int]:
        """Guesses at what follows `token`, the likeliest first, made with what is in RAM alone.

        The KV cache counts the token: truncate it before the next exact pass.
        """
        places = Places.in_line(self.cache.length, 1)
        x = self._pass(np.array([token]), places, silent, exact=False)
        self.cache.advance(1)
        # a cap keeps their order, and a head's bias is as long as the whole vocabulary: a guess does without
        (h,) = self._finish(self._vectors, x=x)
        logits = self._head_linear(h, self._likely)[0]
        most = min(most, len(logits)) if self._branches else 1
        best = np.argpartition(-logits, most - 1)[:most]
        return [int(i) for i in best[np.argsort(-logits[best])]]

    @property
    def pages(self) -> bool:
        """Whether a pass reads the card, so that one which checks several tokens costs what one costs."""
        return self._layers[0].pinned.used < self._model.groups

    @property
    def drafts(self) -> bool:
        """Whether a draft is cheaper than a pass and better than nothing: some groups are pinned, some not."""
        return 0 < self._layers[0].pinned.used < self._model.groups

    def _pass(self, tokens: Tokens, places: Places, on_step: OnStep, exact: bool = True) -> Floats:
        """[T, H] behind the last layer."""
        x = self._embed(tokens, places.positions[0])
        for i, layer in enumerate(self._layers):
            (h,) = self._enter(layer.vectors, x=x)
            heads = self._attend(i, self._attention_linear(h, layer.qkv), layer.vectors, places)
            x, h = self._middle(layer.vectors, x=x, h=h, branch=self._attention_linear(heads, layer.output))
            y = self._feed_forward(i, layer, h, on_step) if exact else self._ffn(h, layer.pinned.rows)
            (x,) = self._leave(layer.vectors, x=x, branch=y)
            on_step(i + 1, self._model.layers, self.card.bytes_read)
        return x

    def _said(self, x: Floats) -> Floats:
        """Logits [R, V] of x [R, H] behind the last layer."""
        (h,) = self._finish(self._vectors, x=x)
        logits = self._head_linear(h, self._head)
        return self._logits(self._vectors, x=logits)[0] if self._logits else logits

    def _feed_forward(self, i: int, layer: _Layer, h: Floats, on_step: OnStep) -> Floats:
        y = self._ffn(h, layer.pinned.rows)  # [T, H]
        for extent, raw in self._stream.layer(i):
            self._passing.insert(extent.first, self._form.views(raw))
            y += self._ffn(h, self._passing.rows)
            self._passing.clear()
            on_step(i, self._model.layers, self.card.bytes_read)
        return y

    def _load_layer(self, i: int, plan: Plan, on_step: OnStep) -> _Layer:
        m, at = self._model, f"layer.{i}."
        layer = _Layer(
            vectors=graph.named(self._bundle.floats(f"{at}vectors"), m.layer_vectors()),
            qkv=self._bundle.rows(f"{at}qkv"),
            output=self._bundle.rows(f"{at}output"),
            pinned=Window(self._bundle.header.group, m.groups, plan.pinned_groups),
        )
        for first, raw in self._bundle.groups(i, plan.pinned_groups):
            layer.pinned.insert(first, self._bundle.header.group.views(raw))
        on_step(i + 1, m.layers, 0)
        return layer
