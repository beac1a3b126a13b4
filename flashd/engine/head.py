"""The head of a model that does not fit: logits behind the last layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.rows import Bytes, Floats, PlainRows, QuantRows
from flashd.engine import graph
from flashd.engine.card import READ_BYTES, CardStream
from flashd.engine.ffn import OnStep
from flashd.engine.plan import Plan

Meanwhile = Callable[[Floats], AbstractContextManager[object]]
"""Called with the logits [R, n] of the likely tokens: what is done while those of the others stream past."""


class Head:
    """Rows of the likeliest tokens are in RAM; the others stream past behind the last layer, once for a pass.

    BPE numbers its tokens by frequency, so the first are nearly all of a text. What the others would take of RAM
    holds FFN groups instead: a pass reads as many bytes, and a draft, which chooses among the first, is right more
    often.
    """

    def __init__(self, bundle: Bundle, plan: Plan, stream: CardStream | None) -> None:
        formats, self._model = bundle.header.formats, bundle.header.model
        self._form = bundle.header.row_format("head")
        self._product = graph.Linear(bundle.read(f"graph.linear.{formats.head}"), rounded=formats.rounded_head)
        self._kept = bundle.rows("head", plan.head_rows)
        self._stream, self._section = stream, len(bundle.header.ffn_parts)
        streams = len(self._kept) < self._model.vocabulary
        self._passing = self._form.empty(READ_BYTES // self._form.nbytes if streams else 0)

    def __call__(self, h: Floats, on_step: OnStep, meanwhile: Meanwhile = nullcontext) -> Floats:
        """h [R, H] -> logits [R, V]. Raises CardError, DamagedRun."""
        kept, layers = len(self._kept), self._model.layers
        out = np.empty((len(h), self._model.vocabulary), np.float32)
        out[:, :kept] = self.of_likely(h)
        if self._stream is None:
            return out
        at = kept
        with meanwhile(out[:, :kept]):
            for _, raw in self._stream.section(self._section):
                out[:, at : at + len(raw)] = self._product(h, self._copied(raw))
                at += len(raw)
                on_step(layers, layers, self._stream.stats.bytes_read)
        return out

    def of_likely(self, h: Floats) -> Floats:
        """h [R, H] -> logits [R, n] of the tokens whose rows are in RAM."""
        return self._product(h, self._kept)

    def _copied(self, raw: Bytes) -> QuantRows | PlainRows:
        """Rows as a product wants them, each part by itself."""
        rows = self._passing[: len(raw)]
        rows.take(self._form.views(raw))
        assert isinstance(rows, QuantRows | PlainRows)
        return rows
