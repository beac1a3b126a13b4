"""What may follow a token, by the passes before: guesses that cost nothing to make."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from flashd.bundle.rows.kinds import Floats

STEP = 0.05
"""How far a guess that was right or wrong moves the trust in the next."""

FOLLOWERS = (0.3, 0.1, 0.08, 0.06, 0.04, 0.03, 0.02, 0.02)
"""How often what a pass found likeliest behind a token, second likeliest and so on, follows that token elsewhere, if
no other guess is right. Measured with Qwen2.5-Coder-1.5B."""

NEW = 4
"""How many likely followers of a token a pass adds."""

MOST_KNOWN = 4096
"""Tokens of which it is kept what may follow them. It takes less than a megabyte."""


class Followers:
    """What may follow each token, by the passes before, whatever stood before it.

    A pass says what is likely behind each of its nodes, and those that were wrong say it too. This is token recycling
    (arXiv 2408.08696).
    """

    def __init__(self) -> None:
        self.rates = list(FOLLOWERS)
        """How often a guess of each rank is right if no guess of another kind is."""
        self._of: dict[int, array[int]] = {}  # the tokens that were seen last are at the end

    def of(self, token: int) -> Sequence[int]:
        """The likeliest tokens behind `token`, in this order; none if it was not seen."""
        return self._of.get(token, ())

    def learn(self, tokens: Sequence[int], logits: Floats) -> None:
        """Keeps what is likeliest behind each of `tokens` [T], by logits [T, n] of the first n tokens.

        What was likely behind them before comes after that.
        """
        count = min(NEW, logits.shape[1])
        best = np.argpartition(-logits, count - 1, axis=1)[:, :count]  # [T, count], in no order
        order = np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable")
        for token, found in zip(tokens, np.take_along_axis(best, order, 1).tolist(), strict=True):
            before = (old for old in self._of.pop(token, ()) if old not in found)
            self._of[token] = array("i", [*found, *before][: len(FOLLOWERS)])
        while len(self._of) > MOST_KNOWN:
            del self._of[next(iter(self._of))]

    def measured(self, guessed: dict[int, int], drawn: int) -> None:
        """Says what was drawn behind a token. `guessed`: those of its followers that a pass had checked, by rank."""
        for rank, token in guessed.items():
            self.rates[rank] += STEP * ((token == drawn) - self.rates[rank])
