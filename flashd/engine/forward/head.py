"""The head: the product that turns the last hidden state into logits. Rows of unlikely tokens stay on the card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from flashd.bundle.arrays import Rows
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Bytes, Floats
from flashd.engine.forward import products
from flashd.engine.model.contract import Meanwhile, OnStep
from flashd.engine.paging.card import READ_BYTES, CardStream
from flashd.engine.planning.plan import LOGIT_ROWS, Plan


class Head:
    """Keeps the rows of the first tokens in RAM. The others stream past behind the last layer, once a pass.

    BPE numbers its tokens by frequency, so the first make up nearly all of a text. The RAM that the other rows would
    take holds FFN groups instead. A pass reads as many bytes either way, but a draft, which chooses among the first
    tokens only, is right more often.
    """

    def __init__(self, bundle: Bundle, plan: Plan, stream: CardStream | None) -> None:
        formats, self._model = bundle.header.formats, bundle.header.model
        self._form = bundle.header.row_format("head")
        self._product = products.Linear(bundle.read(f"graph.linear.{formats.head}"), rounded=formats.rounded_head)
        self._kept = bundle.rows("head", plan.head_rows)
        self._stream, self._section = stream, len(bundle.header.ffn_sections)
        streams = len(self._kept) < self._model.vocabulary
        self._passing = self._form.empty(READ_BYTES // self._form.nbytes if streams else 0)

    def __call__(self, h: Floats, on_step: OnStep, meanwhile: Meanwhile = nullcontext) -> Floats:
        """h [R, H] -> logits [R, V] float32. For `meanwhile` see the contract. Raises CardError, DamagedRun."""
        kept = len(self._kept)
        out = np.empty((len(h), self._model.vocabulary), np.float32)
        out[:, :kept] = self.of_likely(h)
        if self._stream is None:
            return out
        with meanwhile(out[:, :kept]):
            for first, logits in self._of_others(h, self._stream, on_step):
                out[:, first : first + logits.shape[1]] = logits
        return out

    def in_parts(self, h: Floats, on_step: OnStep) -> Iterator[tuple[int, Floats]]:
        """The same in parts: (first token, logits [R, n] of the n tokens from it on).

        However large R is, a part takes no more memory than LOGIT_ROWS rows of the whole vocabulary.
        """
        kept, most = len(self._kept), max(1, LOGIT_ROWS * self._model.vocabulary // len(h))
        for first in range(0, kept, most):
            yield first, self._product(h, self._kept[first : first + most])
        if self._stream is not None:
            yield from self._of_others(h, self._stream, on_step)

    def of_likely(self, h: Floats) -> Floats:
        """h [R, H] -> logits [R, n] of the tokens whose rows are in RAM."""
        return self._product(h, self._kept)

    def _of_others(self, h: Floats, stream: CardStream, on_step: OnStep) -> Iterator[tuple[int, Floats]]:
        """The logits of the tokens whose rows stream past, in parts: (first token, logits [R, n])."""
        first, layers = len(self._kept), self._model.layers
        for _, raw in stream.section(self._section):
            yield first, self._product(h, self._copied(raw))
            first += len(raw)
            on_step(layers, layers, stream.stats.bytes_read)

    def _copied(self, raw: Bytes) -> Rows:
        """Rows [n, row bytes] as a product wants them: each of their parts contiguous."""
        rows = self._passing[: len(raw)]
        rows.take(self._form.views(raw))
        return rows
