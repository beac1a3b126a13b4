"""What to draft for the next pass over the card, and how much.

When reading is the cost, a pass that checks five tokens costs what one costs. What followed the same words
earlier in the text is free to try; a draft from RAM is cheap. Both are often wrong, so their lengths follow what
was measured: how often each was right, what it and a pass took.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 8
"""Drafted tokens at the most."""

MEMORY = 0.8
"""How much of a running mean stays when something new is measured."""

PROBE = 16
"""Passes without a draft after which one is tried again: the text may have become easier."""


LONGEST, SHORTEST = 4, 2
"""Tokens at the end of a text that are looked for earlier in it, the longest run first."""


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens that followed where `tokens` last ended as they end now (prompt-lookup decoding).

    Texts repeat themselves: names, code, what a question said and its answer says again.
    """
    for n in range(LONGEST, SHORTEST - 1, -1):
        end = list(tokens[-n:])
        for at in range(len(tokens) - n - 1, -1, -1):
            if list(tokens[at : at + n]) == end:
                return list(tokens[at + n : at + n + most])
    return []


class DraftLength:
    """For one kind of draft, running means of what drafting costs (seconds) and how often it is right."""

    def __init__(self) -> None:
        self._right = 0.5
        self._draft: float | None = None
        self._pass: float | None = None
        self._idle = 0

    def choose(self) -> int:
        """The number of tokens that makes the most tokens a second."""
        if self._draft is None or self._pass is None:
            return 2
        best = max(range(MOST + 1), key=lambda k: self._rate(k, self._draft or 0.0, self._pass or 0.0))
        if best == 0:
            self._idle += 1
            best = int(self._idle % PROBE == 0)
        return best

    def measured_draft(self, tokens: int, seconds: float) -> None:
        """Drafting `tokens` took `seconds`."""
        self._draft = _mean(self._draft, seconds / tokens)

    def measured_pass(self, seconds: float) -> None:
        """A pass over the card took `seconds`."""
        self._pass = _mean(self._pass, seconds)

    def measured_token(self, right: bool) -> None:
        """A drafted token was what the exact model says, or it was not."""
        self._right = MEMORY * self._right + (1 - MEMORY) * right

    def _rate(self, k: int, draft: float, full: float) -> float:
        expected = sum(self._right**i for i in range(k + 1))
        return expected / (full + k * draft)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new
