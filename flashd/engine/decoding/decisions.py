"""Decisions: which of a few texts the model would answer, and how likely each is.

The tokens of the choices form a tree. The model is asked only at its forks, where more than one token is possible.
Two choices that differ in their first token cost no pass beyond the prompt's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.errors import UsageError

MOST_CHOICES = 64

Choices = Mapping[str, Sequence[int]]
"""The text of each choice -> its tokens."""


@dataclass(frozen=True)
class Decision:
    """The choice that was drawn, and the probability of each, which sum to 1."""

    text: str
    probabilities: dict[str, float]


def check(choices: Choices) -> None:
    """Raises UsageError for fewer than two choices, more than MOST_CHOICES, or two with the same tokens."""
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise UsageError(f"{len(choices)} choices; allowed are 2 to {MOST_CHOICES}")
    if len({tuple(tokens) for tokens in choices.values()}) < len(choices):
        raise UsageError("two choices are the same; make them differ")


def decide(
    logits: Callable[[Sequence[int]], Floats], choices: Choices, end: int, temperature: float, seed: int | None
) -> Decision:
    """Draws one of `choices`. Temperature 0 takes the likeliest.

    The probability of a choice is a product over the forks on its way: at each, the softmax over the tokens that are
    possible there.

    Args:
        logits: called with tokens, gives the logits [V] behind the prompt and these tokens.
        choices: what may be answered.
        end: the token that ends an answer. It tells "no" from the beginning of "not now".
        temperature: 0 or more.
        seed: of the random draw; None draws anew each time.

    Raises UsageError as `check` does.
    """
    check(choices)
    ends = {name: (*tokens, end) for name, tokens in choices.items()}
    p = _spread(logits, ends, 0)
    names, values = list(p), np.array(list(p.values()))
    if temperature == 0:
        return Decision(names[int(values.argmax())], p)
    with np.errstate(divide="ignore", over="ignore"):
        # subtract the largest first: a tiny temperature then makes one choice certain, and no infinities
        sharpened = _softmax((np.log(values) - np.log(values.max())) / temperature)
    return Decision(names[int(np.random.default_rng(seed).choice(len(names), p=sharpened))], p)


def _spread(
    logits: Callable[[Sequence[int]], Floats], choices: Mapping[str, tuple[int, ...]], depth: int
) -> dict[str, float]:
    """The probability of each of `choices`, given the first `depth` tokens, which they share."""
    if len(choices) == 1:
        return dict.fromkeys(choices, 1.0)
    while len({tokens[depth] for tokens in choices.values()}) == 1:
        depth += 1
    branches: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tokens in choices.items():
        branches.setdefault(tokens[depth], {})[name] = tokens
    said = next(iter(choices.values()))[:depth]
    p = _softmax(logits(said)[list(branches)].astype(np.float64))  # [branches]
    return {
        name: float(share) * inner
        for share, branch in zip(p, branches.values(), strict=True)
        for name, inner in _spread(logits, branch, depth + 1).items()
    }


def _softmax(
    values: Floats | np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    e = np.exp(values - values.max())
    return np.asarray(e / e.sum())
