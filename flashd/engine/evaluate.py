"""Perplexity of a text under a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashd.bundle.row_kinds import Floats
from flashd.engine.model.contract import Model
from flashd.errors import UsageError


@dataclass(frozen=True)
class Evaluation:
    """How well a text was foreseen."""

    tokens: int
    perplexity: float
    bits_per_token: float


def perplexity(
    model: Model, tokens: Sequence[int], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Perplexity over `tokens`, in windows of the model's context, each from an empty cache.

    The first token of a window is not counted: nothing stands before it. Raises UsageError for a text of
    fewer than two tokens.
    """
    if len(tokens) < 2:
        raise UsageError("the text has fewer than two tokens; there is nothing to foresee")
    lost, counted = 0.0, 0
    for start in range(0, len(tokens) - 1, model.cache.context):
        window = np.array(tokens[start : start + model.cache.context], np.int64)
        model.cache.truncate(0)
        model.cache.hold(0)
        for at in range(0, len(window), model.pass_tokens):
            chunk = window[at : at + model.pass_tokens]
            following = window[at + 1 : at + 1 + len(chunk)]
            foreseen = _Foreseen(following)
            for first, logits in model.in_parts(chunk):
                foreseen.see(first, logits[: len(following)])
            lost += foreseen.lost
            counted += len(following)
            on_progress(start + at + len(chunk), len(tokens))
    mean = lost / counted
    return Evaluation(counted, float(np.exp(mean)), mean / float(np.log(2)))


class _Foreseen:
    """How well tokens [R] were foreseen, by logits of some tokens of the vocabulary at a time."""

    def __init__(self, tokens: npt.NDArray[np.int64]) -> None:
        self._tokens = tokens
        self._own = np.zeros(len(tokens))  # logits
        self._top = np.full(len(tokens), -np.inf)  # the largest logits so far
        self._sum = np.zeros(len(tokens))  # of all so far, exponentiated, in parts of the largest

    def see(self, first: int, logits: Floats) -> None:
        """Takes account of logits [R, n] of the tokens from `first` on, and writes over them."""
        place = self._tokens - first
        (here,) = np.nonzero((place >= 0) & (place < logits.shape[1]))
        self._own[here] = logits[here, place[here]]
        top = np.maximum(self._top, logits.max(1))
        logits -= top[:, None].astype(np.float32)
        np.exp(logits, out=logits)
        self._sum = self._sum * np.exp(self._top - top) + logits.sum(1)
        self._top = top

    @property
    def lost(self) -> float:
        """In nats, of all of them."""
        return float((self._top + np.log(self._sum) - self._own).sum())
