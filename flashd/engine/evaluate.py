"""Perplexity of a text under a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.contract import Model
from flashd.errors import UsageError


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    tokens: int
    perplexity: float
    bits_per_token: float


def perplexity(
    model: Model, tokens: Sequence[int], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Perplexity over `tokens`, in stretches as long as the model's context, each from an empty cache.

    The first token of a stretch is not counted, since nothing stands before it. `on_progress` is called with (tokens
    done, tokens in all). Raises UsageError for a text of fewer than two tokens; CardError, DamagedRun.
    """
    if len(tokens) < 2:
        raise UsageError("the text has fewer than two tokens; there is nothing to predict")
    lost, counted = 0.0, 0
    for start in range(0, len(tokens) - 1, model.cache.context):
        stretch = np.array(tokens[start : start + model.cache.context], np.int64)  # [n]
        model.cache.truncate(0)
        model.cache.hold(0)
        for at in range(0, len(stretch), model.pass_tokens):
            chunk = stretch[at : at + model.pass_tokens]  # [T]
            following = stretch[at + 1 : at + 1 + len(chunk)]  # [R], R = T or, at the end, T - 1
            surprise = _Surprise(following)
            for rows, first, logits in model.in_parts(chunk):
                surprise.add(rows, first, logits)
            lost += surprise.nats
            counted += len(following)
            on_progress(start + at + len(chunk), len(tokens))
    mean = lost / counted
    return Evaluation(counted, float(np.exp(mean)), mean / float(np.log(2)))


class _Surprise:
    """The negative log-likelihood of tokens [R], from logits of some tokens of the vocabulary at a time."""

    def __init__(self, tokens: npt.NDArray[np.int64]) -> None:
        self._tokens = tokens  # [R]
        self._own = np.zeros(len(tokens))  # [R], the logits of the tokens themselves
        self._top = np.full(len(tokens), -np.inf)  # [R], the largest logits so far
        self._sum = np.zeros(len(tokens))  # [R], the sum of exp(logit - top) so far

    def add(self, rows: slice, first: int, logits: Floats) -> None:
        """Takes logits [r, n] of some `rows` and of the n tokens from number `first` on. It overwrites them.

        Rows behind the last token are left out.
        """
        own, top_now, sum_now = self._own[rows], self._top[rows], self._sum[rows]  # views [r]
        logits = logits[: len(own)]
        place = self._tokens[rows] - first  # [r]
        (here,) = np.nonzero((place >= 0) & (place < logits.shape[1]))
        own[here] = logits[here, place[here]]
        top = np.maximum(top_now, logits.max(1))  # [r]
        logits -= top[:, None].astype(np.float32)
        np.exp(logits, out=logits)
        sum_now[:] = sum_now * np.exp(top_now - top) + logits.sum(1)
        top_now[:] = top

    @property
    def nats(self) -> float:
        """The sum over all R tokens, in nats."""
        return float((self._top + np.log(self._sum) - self._own).sum())
