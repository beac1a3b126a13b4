"""What to draft for the next pass over the card, and how much.

When reading is the cost, a pass that checks sixteen tokens costs what one costs. What followed the same words earlier
in the text is free to try; guesses from RAM are cheap, for several tokens at once hardly more than for one. So drafts
grow as trees where they are likeliest to be right, as long as that makes more tokens a second. Of several texts that
share a pass each has its tree, and grows where all of them are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashd.engine.model.branches import behind
from flashd.engine.model.contract import Guesses
from flashd.engine.model.sizes import NODES

BEAM = 3
"""Tokens that guesses are made behind at once: their weights are widened for all of them together."""

STEPS = 4
"""Steps of drafting before any was measured."""

MEMORY = 0.9
"""How much of a running mean stays when something new is measured."""

STEP, LEAST_TRUST = 0.05, 0.1
"""How far a promise that was kept or broken moves the trust in the next, and how far it falls."""

PROBE = 16
"""Passes without a draft after which one is tried again: the text may have become easier."""

LONGEST, SHORTEST = 4, 2
"""Tokens at the end of a text that are looked for earlier in it, the longest run first."""


@dataclass(frozen=True)
class Trees:
    """Tokens that a pass checks: behind each text what was said last, a root, and guesses at what follows.

    A text's root has the parent `behind(text)`, other nodes have earlier ones.
    """

    tokens: list[int]
    parents: list[int]
    odds: list[float]  # of each node, that it and all before it are right

    def root(self, text: int) -> int:
        """The node that stands behind a text."""
        return self.parents.index(behind(text))

    def guesses(self, text: int) -> int:
        """How many of the nodes are guesses at what follows a text."""
        texts: list[int] = []
        for parent in self.parents:
            texts.append(texts[parent] if parent >= 0 else ~parent)
        return texts.count(text) - 1

    def child(self, node: int, token: int) -> int | None:
        """The node that says `token` behind `node`."""
        return next((i for i in self._children(node) if self.tokens[i] == token), None)

    def promised(self, node: int) -> float:
        """How likely what follows `node` is among the guesses at it, by their odds."""
        return sum(self.odds[i] for i in self._children(node)) / self.odds[node]

    def _children(self, node: int) -> Iterator[int]:
        return (i for i, parent in enumerate(self.parents) if parent == node)


class Draft:
    """Trees of guesses, one behind each text, that grow where they are likeliest to be right.

    A node's odds are those of all on the way to it together, so that no node is likelier than its parent: the best of
    them are trees again. That a draft's own odds tell how often it is right was found for EAGLE-2 (arXiv 2406.16858,
    section 4); here, where neurons are missing, it is too sure, and `trust` is what its odds are worth.
    """

    def __init__(self, said: Sequence[int], rooms: Sequence[int], trust: float) -> None:
        """`said`: the last token of each text; `rooms`: how many may follow it at most."""
        self._trust = trust
        self._tokens, self._parents, self._odds = list(said), [behind(i) for i in range(len(said))], [1.0] * len(said)
        self._rooms = list(rooms)  # behind each node
        self._known: dict[tuple[int, int], int] = {}  # nodes by their parents and tokens
        self._drafted: list[int] = []  # nodes whose successors were guessed at, in order

    def follow(self, text: int, found: Sequence[int], odds: float) -> None:
        """Adds a chain behind a text, each of its tokens right with these odds if the one before it is."""
        node = text
        for token in found:
            node = self._add(node, token, odds)

    def likeliest(self, most: int) -> list[int]:
        """Up to `most` nodes behind which there is room and nothing was guessed yet."""
        open_ = (i for i in range(len(self._tokens)) if i not in self._drafted and self._rooms[i] > 0)
        return sorted(open_, key=lambda i: -self._odds[i])[:most]

    def asked(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """(their tokens, the parents of all that was drafted before and of these) as a model drafts them."""
        order = [*self._drafted, *nodes]
        return [self._tokens[i] for i in nodes], self._parents_in(order)

    def grow(self, nodes: Sequence[int], guesses: Guesses) -> None:
        """Adds the guesses behind `nodes`."""
        for i, tokens, odds in zip(nodes, guesses.tokens.tolist(), guesses.odds.tolist(), strict=True):
            for token, each in zip(tokens, odds, strict=True):
                self._add(i, token, self._trust * each)
        self._drafted += nodes

    def trees(self, most: int) -> Trees:
        """The likeliest nodes."""
        best = self._best(most)
        return Trees([self._tokens[i] for i in best], self._parents_in(best), [self._odds[i] for i in best])

    def expected(self, most: int) -> float:
        """Tokens that a pass over the likeliest nodes gives, by their odds."""
        return sum(self._odds[i] for i in self._best(most))

    def odds(self, nodes: Sequence[int]) -> float:
        return sum(self._odds[i] for i in nodes)

    def _parents_in(self, order: Sequence[int]) -> list[int]:
        """The parents of nodes, which are in `order` too."""
        place = {node: i for i, node in enumerate(order)}
        return [place.get(self._parents[node], self._parents[node]) for node in order]

    def _best(self, most: int) -> list[int]:
        return sorted(range(len(self._tokens)), key=lambda i: (-self._odds[i], i))[:most]

    def _add(self, parent: int, token: int, odds: float) -> int:
        odds *= self._odds[parent]
        node = self._known.setdefault((parent, token), len(self._tokens))
        if node < len(self._tokens):
            self._odds[node] = max(self._odds[node], odds)
            return node
        self._tokens.append(token)
        self._parents.append(parent)
        self._odds.append(odds)
        self._rooms.append(self._rooms[parent] - 1)
        return node


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens that followed where `tokens` last ended as they end now (prompt-lookup decoding).

    Texts repeat themselves: names, code, what a question said and its answer says again.
    """
    if most < 1:
        return []  # models that do not page ask so for every token
    for n in range(LONGEST, SHORTEST - 1, -1):
        end = list(tokens[-n:])
        for at in range(len(tokens) - n - 1, -1, -1):
            if list(tokens[at : at + n]) == end:
                return list(tokens[at + n : at + n + most])
    return []


class Pace:
    """Running means of what a step of drafting and a pass cost (seconds), and of how often guesses are right."""

    def __init__(self) -> None:
        # until this text has told
        self.trust = 0.7
        """What the odds of guesses from RAM are worth."""
        self.looked_up = 0.5
        """How often what was looked up is right."""
        self._draft: float | None = None
        self._pass: float | None = None
        self._idle = 0

    def goes_on(self, draft: Draft, steps: int, nodes: Sequence[int]) -> bool:
        """Whether guesses behind `nodes`, after so many steps, make more tokens a second."""
        if self._draft is None or self._pass is None:
            return steps < STEPS
        expected = draft.expected(NODES)
        # of the least likely nodes, as many as come give way to them
        gain = self.trust * draft.odds(nodes) - (expected - draft.expected(NODES - len(nodes)))
        pays = gain * (self._pass + steps * self._draft) > expected * self._draft
        if not pays and steps == 0:
            self._idle += 1
            return self._idle % PROBE == 0
        return pays

    def measured_draft(self, seconds: float) -> None:
        """A step of drafting took `seconds`."""
        self._draft = _mean(self._draft, seconds)

    def measured_pass(self, seconds: float) -> None:
        """A pass over the card took `seconds`."""
        self._pass = _mean(self._pass, seconds)

    def measured_guesses(self, right: bool, promised: float) -> None:
        """What was said was among the guesses, or not; their odds had `promised` it."""
        self.trust = min(max(self.trust + STEP * (right - promised), LEAST_TRUST), 1.0)

    def measured_lookup(self, right: bool) -> None:
        """What was said was looked up, or something else was."""
        self.looked_up = _mean(self.looked_up, right)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new
