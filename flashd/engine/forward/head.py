"""The head: logits of all tokens, those of the likely ones from RAM."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import numpy as np

from flashd.bundle.arrays import Rows
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.head_rows import HeadRows
from flashd.engine.model.contract import Finish, Meanwhile, OnStep
from flashd.engine.model.sizes import LOGIT_ROWS
from flashd.engine.paging.card import CardStream
from flashd.engine.planning.parts import head_part
from flashd.engine.planning.plan import Plan


class Head:
    """Rows of the likeliest tokens are in RAM; the others stream past behind the last layer, once for a pass.

    BPE numbers its tokens by frequency, so the first are nearly all of a text. What the others would take of RAM
    holds FFN groups instead: a pass reads as many bytes, and a draft, which chooses among the first, is right more
    often.
    """

    def __init__(self, bundle: Bundle, rows: HeadRows, plan: Plan, stream: CardStream | None) -> None:
        self._model, self._kept, self._part = bundle.header.model, plan.head_rows, head_part(bundle.header)
        self._stream = stream if self._kept < self._model.vocabulary else None
        self._section = len(bundle.header.ffn_sections)
        self._rows = rows
        self._parts = [part for _, some in bundle.table("head", self._kept, self._part) for part in rows.kept(some)]

    def row(self, token: int) -> Rows | None:
        """A token's row, arrays [1, m], if it is in RAM and can be got."""
        return self._rows.row(self._parts, token)

    @property
    def streams(self) -> bool:
        """Whether rows stream past."""
        return self._stream is not None

    def __call__(
        self, h: Floats, on_step: OnStep, meanwhile: Meanwhile = nullcontext, finish: Finish | None = None
    ) -> Floats:
        """h [R, H] -> logits [R, V], or of those of the R rows that `finish` names. Raises CardError, DamagedRun."""
        likely = self.of_likely(h)  # [R, n]
        rows = finish(likely) if finish else np.arange(len(h))
        if self._stream is None:
            return likely[rows] if finish else likely
        out, h = np.empty((len(rows), self._model.vocabulary), np.float32), h[rows]
        out[:, : self._kept] = likely[rows]
        with meanwhile(likely), closing(self._of_others(h, self._stream, on_step)) as others:
            for first, logits in others:
                out[:, first : first + logits.shape[1]] = logits
        return out

    def in_parts(self, h: Floats, on_step: OnStep, bias: Floats | None) -> Iterator[tuple[slice, int, Floats]]:
        """Finished logits of h [T, H], of some rows and tokens of the vocabulary at a time.

        Each is (which rows, the first token, logits [R, n]).

        What follows the head is done to them, with its `bias` [V] if the model has one: the graph that does it takes
        the whole vocabulary. However many rows there are, no more is held at once than LOGIT_ROWS of it take.
        """
        for rows, first, logits in self._pieces(h, on_step):
            if bias is not None:
                logits = logits + bias[first : first + logits.shape[1]]
            if cap := np.float32(self._model.logit_cap):
                logits = cap * np.tanh(logits / cap)
            yield rows, first, logits

    def _pieces(self, h: Floats, on_step: OnStep) -> Iterator[tuple[slice, int, Floats]]:
        most, first = max(1, LOGIT_ROWS * self._model.vocabulary // self._part), 0
        for part in self._parts:
            for at in range(0, len(h), most):
                rows = slice(at, min(at + most, len(h)))
                (logits,) = self._rows.products(h[rows], [part])
                yield rows, first, logits
            first += logits.shape[1]
        if self._stream is not None:
            for first, logits in self._of_others(h, self._stream, on_step):
                yield slice(0, len(h)), first, logits

    def of_likely(self, h: Floats, drafting: bool = False) -> Floats:
        """h [R, H] -> logits [R, n] of the tokens whose rows are in RAM. `drafting`: they need not be exact."""
        out, first = np.empty((len(h), self._kept), np.float32), 0
        for logits in self._rows.products(h, self._parts, drafting):
            out[:, first : first + logits.shape[1]] = logits
            first += logits.shape[1]
        return out

    def _of_others(self, h: Floats, stream: CardStream, on_step: OnStep) -> Generator[tuple[int, Floats]]:
        """The logits of the tokens whose rows stream past, in parts."""
        first, layers = self._kept, self._model.layers

        def coming() -> Generator[Any]:
            for _, parts in stream.section(self._section):
                yield from parts
                on_step(layers, layers, stream.stats.bytes_read)

        with closing(coming()) as parts:
            for logits in self._rows.products(h, parts):
                yield first, logits
                first += logits.shape[1]
