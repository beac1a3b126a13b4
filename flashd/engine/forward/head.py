"""The head: logits of all tokens, those of the likely ones from RAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants, multiplied
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

    def __init__(self, bundle: Bundle, constants: Constants, plan: Plan, stream: CardStream | None) -> None:
        self._model, self._kept, self._part = bundle.header.model, plan.head_rows, head_part(bundle.header)
        self._stream = stream if self._kept < self._model.vocabulary else None
        self._section = len(bundle.header.ffn_sections)
        self._doubled = constants.arithmetic == "float32" or not plan.resident
        hidden = self._model.hidden
        self._parts = [
            (first, constants.rows(rows, hidden)) for first, rows in bundle.table("head", plan.head_rows, self._part)
        ]

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
        with meanwhile(likely):
            for first, logits in self._of_others(h, self._stream, on_step):
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
        most = max(1, LOGIT_ROWS * self._model.vocabulary // self._part)
        for first, session in self._parts:
            for at in range(0, len(h), most):
                rows = slice(at, min(at + most, len(h)))
                yield rows, first, multiplied(session, self._doubled, x=h[rows])
        if self._stream is not None:
            for first, logits in self._of_others(h, self._stream, on_step):
                yield slice(0, len(h)), first, logits

    def of_likely(self, h: Floats) -> Floats:
        """h [R, H] -> logits [R, n] of the tokens whose rows are in RAM."""
        out = np.empty((len(h), self._kept), np.float32)
        for at, session in self._parts:
            logits = multiplied(session, self._doubled, x=h)
            out[:, at : at + logits.shape[1]] = logits
        return out

    def _of_others(self, h: Floats, stream: CardStream, on_step: OnStep) -> Iterator[tuple[int, Floats]]:
        """The logits of the tokens whose rows stream past, in parts."""
        first, layers = self._kept, self._model.layers
        for _, session in stream.section(self._section):
            logits = multiplied(session, self._doubled, x=h)
            yield first, logits
            first += logits.shape[1]
            on_step(layers, layers, stream.stats.bytes_read)
