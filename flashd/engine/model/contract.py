"""What decoding asks of a model, and what a model tells of its work. Both forward passes keep to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashd.bundle.row_kinds import Floats
from flashd.engine.model.branches import Branches
from flashd.engine.model.kv_cache import KvCache

Tokens = npt.NDArray[np.int64]


OnStep = Callable[[int, int, int], None]
"""Called as a pass goes on with (layers done, layers in all, card bytes read so far). It may raise to stop."""


def silent(done: int, layers: int, nbytes: int) -> None:
    """An OnStep that does nothing."""


Meanwhile = Callable[[Floats], AbstractContextManager[object]]
"""Called with the logits [R, n] of the likely tokens: what is done while those of the others stream past."""


@dataclass
class CardStats:
    """What has been asked of the card. Times in seconds, sizes in bytes."""

    reads: int = 0
    bytes_read: int = 0
    bytes_wanted: int = 0
    waited: float = 0.0
    """How long the consumer stood still for the card."""


@dataclass(frozen=True)
class Guesses:
    """What may follow each of T tokens: m guesses [T, m], the likeliest first, and their odds [T, m]."""

    tokens: npt.NDArray[np.int64]
    odds: Floats

    @classmethod
    def of(cls, logits: Floats, most: int) -> Guesses:
        """The likeliest by logits [T, V]."""
        most = min(most, logits.shape[1])
        best = np.argpartition(-logits, most - 1, axis=1)[:, :most]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable"), 1)
        top = np.take_along_axis(logits, best, 1)  # [T, m]
        total = np.exp(logits - top[:, :1]).sum(1, keepdims=True)
        return cls(best, np.exp(top - top[:, :1]) / total)


class Model(Protocol):
    """A forward pass over a KV cache: PagedModel or ResidentModel."""

    cache: KvCache
    pass_tokens: int
    """Of prompts, that a pass takes."""

    @property
    def card(self) -> CardStats: ...

    @property
    def hit_rate(self) -> float: ...

    @property
    def pages(self) -> bool: ...

    @property
    def drafts(self) -> bool: ...

    @property
    def branches(self) -> bool:
        """Whether the tokens of a pass may stand behind several texts, and guesses in trees."""

    def draft(self, tokens: Tokens, branches: Branches) -> Guesses: ...

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, branches: Branches | None = None,
        meanwhile: Meanwhile = nullcontext,
    ) -> Floats: ...  # fmt: skip

    def in_parts(self, tokens: Tokens, on_step: OnStep = silent) -> Iterator[tuple[int, Floats]]: ...

    def close(self) -> None: ...
