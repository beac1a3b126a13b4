"""Draws the next token from logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec.structs import asdict

from flashd.bundle.header import Drawing
from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.distinct import distinct
from flashd.errors import UsageError

PENALTY_TOKENS = 64
"""The repeat penalty looks at so many of the last tokens."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0, repeat_penalty 1 are off.

    For each time that the answer has a token already, `frequency_penalty` is taken from its logit, and
    `presence_penalty` once. `logit_bias` is added to the logits of the tokens that it names.

    Raises UsageError, which names the option that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = [
            ("--temperature", self.temperature, 0 <= self.temperature <= 10, "0 to 10"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 up to 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("--min-p", self.min_p, 0 <= self.min_p < 1, "0 up to below 1"),
            ("--repeat-penalty", self.repeat_penalty, 0 < self.repeat_penalty <= 10, "above 0 up to 10"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("--seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        ]
        for option, value, holds, allowed in rules:
            if not holds:
                raise UsageError(f"{option} {value} is out of range; allowed is {allowed}")


LARGEST = np.finfo(np.float32).max
"""The largest logit."""

USUAL = Drawing(temperature=0.3, top_p=0.9, min_p=0.05, repeat_penalty=1.1)
"""How answers are drawn if nobody says anything. Without a penalty small models repeat one phrase for ever."""


def sampling_of(wished: Drawing, recommended: Drawing | None, seed: int | None = None) -> Sampling:
    """How an answer is drawn: as somebody wishes, else as the model's makers recommend, else as usual.

    Whoever wishes temperature 0 wants the likeliest token, and no recommendation changes which that is.
    """
    if wished.temperature == 0:
        return _sampling([wished], seed)
    said = [wished] if recommended is None else [wished, recommended]
    if recommended is None or recommended.temperature is None:
        said.append(USUAL)
    return _sampling(said, seed)


def greedy_unless(wished: Drawing, seed: int | None = None) -> Sampling:
    """How a decision or JSON is drawn: the likeliest, unless somebody wishes otherwise."""
    return _sampling([wished], seed)


def _sampling(said: Sequence[Drawing], seed: int | None) -> Sampling:
    """What the first of these says of each property. One that none speaks of is off."""
    parts = [{name: value for name, value in asdict(one).items() if value is not None} for one in reversed(said)]
    return Sampling(**{name: value for part in parts for name, value in part.items()}, seed=seed)


_ROUNDING = 1e-3
"""Of a logit, what a bound is widened by, so that float32 drops nothing that float64 would keep."""


class Constraint(Protocol):
    """A grammar that follows an answer as it is drawn and says which tokens may come next."""

    def mask(self, logits: Floats) -> Floats:
        """Logits [V] with minus infinity for the tokens that may not come next."""

    def advance(self, token: int) -> None:
        """Is told that `token` was drawn."""


@dataclass(frozen=True)
class Score:
    """A token that was drawn, the natural logarithm of its probability, and the likeliest tokens at its place.

    The probabilities are the model's own, before penalties, biases, filters and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws tokens. It filters in llama.cpp's order: penalties, top-k, top-p, min-p, temperature.

    Args:
        sampling: how tokens are drawn.
        constraint: a grammar that says which tokens may come.
        scores: so many of the likeliest tokens are in the score of each token. None: there are no scores.
    """

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None, scores: int | None = None) -> None:
        self._s = sampling
        self._constraint = constraint
        self._random = np.random.default_rng(sampling.seed)
        self._said: Counter[int] = Counter()
        self._bias = np.array(list(sampling.logit_bias.items()), np.float64).reshape(-1, 2)  # [n, (token, bias)]
        self._scores = scores
        self.score: Score | None = None  # that of the last token

    def twin(self) -> Sampler | None:
        """A copy that draws the same tokens from here on. None if there is a constraint, which cannot be copied."""
        if self._constraint is not None:
            return None
        twin = deepcopy(self)
        twin._scores = None
        return twin

    def pick(self, logits: Floats, recent: Sequence[int]) -> int:
        """Draws the next token, given logits [V] and the tokens before it. It does not change the logits."""
        if self._s.temperature == 0:
            token = int(self._allowed(logits, recent).argmax())
        else:
            ids, probabilities = self.distribution(logits, recent)
            # Draw in the order of the tokens' numbers. The order of their odds depends on the last bits of the
            # logits, and these on which neurons are in RAM: the same seed would draw something else.
            order = np.argsort(ids)
            at = int(np.searchsorted(np.cumsum(probabilities[order]), self._random.random(), side="right"))
            token = int(ids[order[min(at, len(ids) - 1)]])
        if self._constraint is not None:
            self._constraint.advance(token)
        self._said[token] += 1
        if self._scores is not None:
            self.score = score(logits, token, self._scores)
        return token

    def distribution(
        self, logits: Floats, recent: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tokens [n] that may be drawn, likeliest first, and their probabilities [n], which sum to 1."""
        s = self._s
        logits = self._allowed(logits, recent)
        if s.temperature == 0:
            return np.array([np.argmax(logits)], np.int64), np.ones(1)
        ids, total = self._candidates(logits)
        values = logits[ids].astype(np.float64)
        p = np.exp(values - values[0]) / total
        keep = np.cumsum(p) - p < s.top_p
        keep &= (p >= s.min_p * p[0]) & (p > 0)
        # subtract the largest first: a tiny temperature then makes zeros, not infinities
        with np.errstate(over="ignore"):
            p = _softmax((values[keep] - values[0]) / s.temperature)
        return ids[keep], p

    def _candidates(self, logits: Floats) -> tuple[npt.NDArray[np.int64], float]:
        """Tokens [n] that may be drawn by top-k and min-p, likeliest first, and the sum of the odds of all top-k.

        Odds are given as multiples of the likeliest token's. Sorting a whole vocabulary takes longer than many a
        small model's pass, so tokens that min-p drops are not sorted.
        """
        s, top = self._s, float(logits.max())
        if s.top_k or not s.min_p:
            ids = _largest(logits, s.top_k)
            return ids, float(np.exp(logits[ids].astype(np.float64) - top).sum())
        ids = np.flatnonzero(logits >= np.float32(top + np.log(s.min_p) - _ROUNDING))
        return ids[np.argsort(-logits[ids])], float(np.exp(logits - np.float32(top)).sum(dtype=np.float64))

    def _allowed(self, logits: Floats, recent: Sequence[int]) -> Floats:
        """Logits [V] after the penalties, the biases and the constraint."""
        logits = self._biased(self._penalised(logits, recent))
        return logits if self._constraint is None else self._constraint.mask(logits)

    def _penalised(self, logits: Floats, recent: Sequence[int]) -> Floats:
        if self._s.repeat_penalty == 1 or not recent:
            return logits
        out = logits.copy()
        seen = distinct(np.array(recent[-PENALTY_TOKENS:], np.int64))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            changed = np.where(out[seen] > 0, out[seen] / self._s.repeat_penalty, out[seen] * self._s.repeat_penalty)
        out[seen] = np.clip(changed, -LARGEST, LARGEST)  # a tiny penalty makes no infinities
        return out

    def _biased(self, logits: Floats) -> Floats:
        """Logits [V] less the penalties for what was said, plus the biases."""
        s = self._s
        out = logits
        if self._said and (s.frequency_penalty or s.presence_penalty):
            said = np.array(list(self._said.items()), np.int64)  # [n, (token, times)]
            out = _added(out, said[:, 0], -(s.frequency_penalty * said[:, 1] + s.presence_penalty))
        return _added(out, self._bias[:, 0].astype(np.int64), self._bias[:, 1]) if len(self._bias) else out


def _added(logits: Floats, tokens: npt.NDArray[np.int64], values: npt.NDArray[np.floating]) -> Floats:
    """Logits [V] plus a value for each of some tokens. The logits may be those of the first tokens alone."""
    there = tokens < len(logits)
    out = logits.copy()
    out[tokens[there]] += values[there].astype(np.float32)
    return out


def score(logits: Floats, token: int, most: int) -> Score:
    """The score of a token by logits [V], with the `most` likeliest tokens."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top = _largest(logits, most) if most else np.empty(0, np.int64)
    return Score(token, float(values[token]), tuple((int(t), float(values[t])) for t in top))


def _largest(logits: Floats, k: int) -> npt.NDArray[np.int64]:
    """[k]: the k likeliest tokens by logits [V], likeliest first. k = 0 means all."""
    ids = np.argpartition(-logits, k - 1)[:k] if 0 < k < len(logits) else np.arange(len(logits))
    return ids[np.argsort(-logits[ids])]


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(values - values.max())
    return np.asarray(e / e.sum())
