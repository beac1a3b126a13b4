"""Logits -> the next token."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashd.bundle.row_kinds import Floats
from flashd.errors import UsageError

PENALTY_TOKENS = 64
"""How many of the last tokens the repeat penalty looks at."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 are off.

    Raises UsageError naming the option that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = [
            ("--temperature", self.temperature, 0 <= self.temperature <= 10, "0 to 10"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 up to 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("--min-p", self.min_p, 0 <= self.min_p < 1, "0 up to below 1"),
            ("--repeat-penalty", self.repeat_penalty, 0 < self.repeat_penalty <= 10, "above 0 up to 10"),
            ("--seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        ]
        for option, value, holds, allowed in rules:
            if not holds:
                raise UsageError(f"{option} {value} is out of range; allowed is {allowed}")


class Constraint(Protocol):
    """Which tokens may come: a grammar that follows the answer as it is drawn."""

    def mask(self, logits: Floats) -> Floats: ...

    def advance(self, token: int) -> None: ...


class Sampler:
    """Draws tokens. Filters in llama.cpp's order: penalty, top-k, top-p, min-p, temperature."""

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None) -> None:
        self._s = sampling
        self._constraint = constraint
        self._random = np.random.default_rng(sampling.seed)

    def twin(self) -> Sampler | None:
        """One that draws the same from here on; None where a constraint follows what is drawn."""
        return None if self._constraint else deepcopy(self)

    def pick(self, logits: Floats, recent: Sequence[int]) -> int:
        """The next token, given logits [V] and the tokens before it. The logits are left as they are."""
        if self._s.temperature == 0:
            token = int(self._allowed(logits, recent).argmax())
        else:
            ids, probabilities = self.distribution(logits, recent)
            # in the order of their numbers: that of their odds changes with the last bits of the logits, which
            # are not the same where other neurons are in RAM, and with it what the same seed draws
            odds = np.zeros(len(logits))
            odds[ids] = probabilities
            at = int(np.searchsorted(np.cumsum(odds), self._random.random(), side="right"))
            token = min(at, int(ids.max()))
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def distribution(
        self, logits: Floats, recent: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tokens [n] that may be drawn, likeliest first, and their probabilities [n], which sum to 1."""
        s = self._s
        logits = self._allowed(logits, recent)
        if s.temperature == 0:
            return np.array([np.argmax(logits)], np.int64), np.ones(1)
        ids = _largest(logits, s.top_k)
        values = logits[ids].astype(np.float64)
        p = _softmax(values)
        keep = np.cumsum(p) - p < s.top_p
        keep &= (p >= s.min_p * p[0]) & (p > 0)
        # from the largest down: a tiny temperature then makes zeros, not infinities
        p = _softmax((values[keep] - values[0]) / s.temperature)
        return ids[keep], p

    def _allowed(self, logits: Floats, recent: Sequence[int]) -> Floats:
        logits = self._penalised(logits, recent)
        return logits if self._constraint is None else self._constraint.mask(logits)

    def _penalised(self, logits: Floats, recent: Sequence[int]) -> Floats:
        if self._s.repeat_penalty == 1 or not recent:
            return logits
        out = logits.copy()
        seen = np.unique(np.array(recent[-PENALTY_TOKENS:], np.int64))
        out[seen] = np.where(out[seen] > 0, out[seen] / self._s.repeat_penalty, out[seen] * self._s.repeat_penalty)
        return out


def _largest(logits: Floats, k: int) -> npt.NDArray[np.int64]:
    """The k likeliest tokens in order, all of them for k = 0."""
    ids = np.argpartition(-logits, k - 1)[:k] if 0 < k < len(logits) else np.arange(len(logits))
    return ids[np.argsort(-logits[ids], kind="stable")]


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(values - values.max())
    return np.asarray(e / e.sum())
