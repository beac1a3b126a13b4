"""What to draft for the next pass over the card, and how much.

When reading is the cost, a pass that checks five tokens costs what one costs. What followed the same words
earlier in the text is free to try; a draft from RAM is cheap. Both are often wrong, so their lengths follow what
was measured: how often each was right, what it and a pass took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST = 8
"""Drafted tokens in a row at the most."""

NODES = 16
"""Tokens of a pass that checks drafts, the one before them included: each takes a row of logits."""

MEMORY = 0.9
"""How much of a running mean stays when something new is measured."""

PROBE = 16
"""Passes without a draft after which one is tried again: the text may have become easier."""

LONGEST, SHORTEST = 4, 2
"""Tokens at the end of a text that are looked for earlier in it, the longest run first."""


@dataclass(frozen=True)
class Tree:
    """Tokens that a pass checks. Node 0 was said; a chain of guesses follows it, then others for a guess's place."""

    tokens: list[int]
    parents: list[int]  # of each node, an earlier one; node 0 is its own
    links: int  # nodes 1 to `links` are the chain

    @classmethod
    def grown(cls, token: int, places: Sequence[Sequence[int]], most: int = NODES) -> Tree:
        """The tree of each place's guesses, likeliest first: the first guesses are the chain.

        The others are taken in turn from all places, up to `most` nodes in all.
        """
        tokens, parents = [token], [0]
        for place, guesses in enumerate(places):
            tokens.append(guesses[0])
            parents.append(place)
        rank = 1
        while len(tokens) < most and any(rank < len(guesses) for guesses in places):
            for place, guesses in enumerate(places):
                if rank < len(guesses) and len(tokens) < most:
                    tokens.append(guesses[rank])
                    parents.append(place)
            rank += 1
        return cls(tokens, parents, len(places))

    def child(self, node: int, token: int) -> int | None:
        """The node that says `token` behind `node`."""
        found = (i for i in range(1, len(self.tokens)) if self.parents[i] == node and self.tokens[i] == token)
        return next(found, None)

    def is_guessed(self, node: int) -> bool:
        """Whether there are guesses at what follows `node`."""
        return node < self.links


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
        # with a third of the neurons pinned, until this text has told
        self._right = 0.6
        self._beside = 0.2
        self._draft: float | None = None
        self._pass: float | None = None
        self._idle = 0

    def choose(self) -> int:
        """The number of tokens that makes the most tokens a second."""
        if self._draft is None or self._pass is None:
            return 4
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

    def measured_token(self, right: bool, beside: bool = False) -> None:
        """The first guess at a token was what the exact model says, or another one `beside` it, or none."""
        self._right = MEMORY * self._right + (1 - MEMORY) * right
        self._beside = MEMORY * self._beside + (1 - MEMORY) * beside

    def _rate(self, k: int, draft: float, full: float) -> float:
        reached = [self._right**i for i in range(k + 1)]
        # behind another guess nothing is drafted: it gives one token where the chain breaks
        expected = sum(reached) + self._beside * sum(reached[:k])
        return expected / (full + k * draft)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new
