"""The contract between decoding and the two forward passes: what a model can do and what it reports of its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.branches import Branches
from flashd.engine.model.kv_cache import KvCache

Tokens = npt.NDArray[np.int64]
"""[T] int64: numbers of tokens, of rows or of positions."""

OnStep = Callable[[int, int, int], None]
"""Called as a pass goes on with (layers done, layers in all, card bytes read so far). It may raise to stop."""


def silent(done: int, layers: int, nbytes: int) -> None:
    """An OnStep that does nothing."""


Finish = Callable[[Floats], Tokens]
"""Called with logits [R, n] of the n tokens whose head rows are in RAM. Returns which of the R rows are wanted in
full, ascending, at most LOGIT_ROWS of them."""

Meanwhile = Callable[[Floats], AbstractContextManager[object]]
"""Called with logits [R, n] of the n tokens whose head rows are in RAM. The context manager that it returns is
entered before the head's other rows stream from the card, and left when they have."""


@dataclass
class CardStats:
    """What has been read from the card since the counts began."""

    reads: int = 0
    bytes_read: int = 0
    bytes_wanted: int = 0  # of those read: without gaps that were read rather than skipped
    table_bytes: int = 0  # of tables that single rows are read of, such as the embeddings; not in `bytes_read`
    waited: float = 0.0  # seconds that the consumer stood still for the card


@dataclass(frozen=True)
class Guesses:
    """What may follow each of T tokens: m guesses, the likeliest first."""

    tokens: npt.NDArray[np.int64]  # [T, m]
    odds: Floats  # [T, m], the probability of each guess by the logits that it was made from

    @classmethod
    def of(cls, logits: Floats, most: int) -> Guesses:
        """The `most` likeliest tokens, or all if there are fewer, by logits [T, V]."""
        most = min(most, logits.shape[1])
        best = np.argpartition(-logits, most - 1, axis=1)[:, :most]  # [T, m], in no order
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable"), 1)
        top = np.take_along_axis(logits, best, 1)  # [T, m]
        total = np.exp(logits - top[:, :1]).sum(1, keepdims=True)  # [T, 1]
        return cls(best, np.exp(top - top[:, :1]) / total)


class Model(Protocol):
    """A forward pass over a KV cache: PagedModel or ResidentModel."""

    cache: KvCache
    pass_tokens: int
    """The most tokens of prompts that one pass takes."""
    nodes: int
    """The most tokens of a pass that checks drafts."""
    texts: int
    """The most texts that may grow together. The tokens of a pass may follow several if they are more than one."""

    @property
    def card(self) -> CardStats:
        """What was read from the card so far."""

    @property
    def hit_rate(self) -> float:
        """The share of the weights that passes needed and found in RAM, 0 to 1."""

    @property
    def shares_reads(self) -> bool:
        """Whether the tokens of a pass share its reads of the card, so that checking several costs what one costs."""

    @property
    def drafts(self) -> bool:
        """Whether `draft` is cheaper than a pass and better than nothing."""

    @property
    def branches(self) -> bool:
        """Whether guesses may form trees. If not, those of a text are one line, and stand one behind the other."""

    def draft(self, tokens: Tokens, branches: Branches) -> Guesses:
        """Guesses at what follows each of `tokens` [T], made from RAM alone."""

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, branches: Branches | None = None,
        meanwhile: Meanwhile = nullcontext, finish: Finish | None = None,
    ) -> Floats:  # fmt: skip
        """Logits [R, V] behind the tokens numbered `wanted` [R] of a pass over `tokens` [T]; the cache keeps all T.

        Without `branches` the tokens follow all that is in the cache. With `finish` only those rows of the R that it
        names come back. Raises CardError, DamagedRun.
        """

    def in_parts(self, tokens: Tokens, on_step: OnStep = silent) -> Iterator[tuple[slice, int, Floats]]:
        """Logits behind `tokens` [T], part by part: (which of them, first token of the vocabulary, logits [R, n])."""

    def close(self) -> None:
        """Closes what the model reads from. The bundle stays open."""
