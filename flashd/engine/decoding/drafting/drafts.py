"""Drafts: the guesses that the next pass over the card checks.

If reading the card is the cost, a pass that checks sixteen tokens costs what a pass of one token costs. There are
four kinds of guesses. What followed the same words earlier in the text costs nothing to try. Guesses made from the
weights in RAM are cheap, and for several tokens at once they cost hardly more than for one. A small model's guesses
are right more often. What a pass found likely behind a token is kept, and tried where the same token comes again. So
guesses form trees, which grow at the nodes that are likeliest to be right, as long as that makes more tokens a
second. Texts that share a pass have a tree each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashd.engine.decoding.drafting.followers import Followers
from flashd.engine.model.branches import behind, texts_of
from flashd.engine.model.contract import Guesses

BEAM = 3
"""Nodes that a step of drafting makes guesses behind: the weights are widened once for all of them."""

LONGEST, SHORTEST = 4, 2
"""How many tokens at the end of a text are looked for earlier in it: first LONGEST, then fewer."""


@dataclass(frozen=True)
class Trees:
    """The tokens that a pass checks, as one tree for each text. Its root is the text's last token.

    The root of a text has the parent `behind(text)`. The parent of every other node is an earlier node.
    """

    tokens: list[int]
    parents: list[int]
    odds: list[float]  # of each node: the probability that it and all nodes on the way to it are right
    ranks: list[int | None]  # of a node that Followers guessed: which of their guesses it was

    def root(self, text: int) -> int:
        """The node of a text's last token."""
        return self.parents.index(behind(text))

    def guesses(self, text: int) -> int:
        """How many nodes are guesses at what follows a text."""
        return len(self.of_text(text)) - 1

    def of_text(self, text: int) -> list[int]:
        """The nodes of a text's tree, the likeliest first."""
        return [node for node, of in enumerate(texts_of(self.parents)) if of == text]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that is `token`; None if `token` was not guessed."""
        return next((i for i in self._children(node) if self.tokens[i] == token), None)

    def promised(self, node: int) -> float:
        """The probability, by their odds, that what follows `node` is among its children that have no rank."""
        return sum(self.odds[i] for i in self._children(node) if self.ranks[i] is None) / self.odds[node]

    def recycled(self, node: int) -> dict[int, int]:
        """The children of `node` that have ranks: their tokens by rank."""
        return {rank: self.tokens[i] for i in self._children(node) if (rank := self.ranks[i]) is not None}

    def _children(self, node: int) -> Iterator[int]:
        return (i for i, parent in enumerate(self.parents) if parent == node)


class Draft:
    """Trees of guesses, one for each text. They grow at the nodes that are likeliest to be right.

    The odds of a node include those of its parent. So no node is likelier than its parent, and the likeliest nodes
    form trees again. EAGLE-2 (arXiv 2406.16858, section 4) found that a draft's odds tell how often it is right. Here
    neurons are missing, so the odds are too high: they are multiplied by `trust`.

    Args:
        said: the last token of each text.
        rooms: how many tokens may follow it, for each text.
        trust: what the odds of guesses from RAM are multiplied by.
        branches: whether there may be trees. If not, each text has its likeliest guesses in one line.
    """

    def __init__(self, said: Sequence[int], rooms: Sequence[int], trust: float, branches: bool = True) -> None:
        self._trust, self._branches = trust, branches
        self._tokens, self._parents, self._odds = list(said), [behind(i) for i in range(len(said))], [1.0] * len(said)
        self._rooms = list(rooms)  # of each node: how many tokens may follow it
        self._known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        self._drafted: list[int] = []  # nodes that guesses were made behind, in order
        self._ranks: dict[int, int] = {}  # of nodes that `recycle` added

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._tokens)

    def follow(self, text: int, found: Sequence[int], odds: float) -> None:
        """Adds a chain of tokens behind a text. `odds` is the probability of each if the one before it is right."""
        node = text
        for token in found:
            node = self._add(node, token, odds)

    def likeliest(self, most: int) -> list[int]:
        """The likeliest nodes, up to `most`, that guesses can be made behind and were not yet."""
        nodes = range(len(self._tokens)) if self._branches else [line[-1] for line in self._lines()]
        open_ = (i for i in nodes if i not in self._drafted and self._rooms[i] > 0)
        return sorted(open_, key=lambda i: -self._odds[i])[:most]

    def path(self, node: int) -> tuple[int, list[int]]:
        """(which text a node is behind, the guesses from its root to the node)."""
        guesses: list[int] = []
        while self._parents[node] >= 0:
            guesses.append(self._tokens[node])
            node = self._parents[node]
        return node, guesses[::-1]

    def asked(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The arguments of Model.draft for `nodes`: (their tokens, the parents of all drafted nodes and of these)."""
        order = [*self._drafted, *nodes]
        return [self._tokens[i] for i in nodes], self._parents_in(order)

    def grow(self, nodes: Sequence[int], guesses: Guesses) -> None:
        """Adds guesses behind each of `nodes` and marks these as drafted."""
        for i, tokens, odds in zip(nodes, guesses.tokens.tolist(), guesses.odds.tolist(), strict=True):
            for token, each in zip(tokens, odds, strict=True):
                self._add(i, token, self._trust * each)
        self._drafted += nodes

    def recycle(self, followers: Followers, most: int) -> None:
        """Adds what may follow the tokens of the `most` likeliest nodes, those that it adds included."""
        done: set[int] = set()
        while (node := next((i for i in self._best(most) if i not in done and self._rooms[i] > 0), None)) is not None:
            done.add(node)
            guessed = sum(self._odds[i] for i, parent in enumerate(self._parents) if parent == node)
            missed = max(0.0, 1 - guessed / self._odds[node])
            for rank, token in enumerate(followers.of(self._tokens[node])):
                if (node, token) not in self._known:
                    self._ranks[self._add(node, token, missed * followers.rates[rank])] = rank

    def trees(self, most: int) -> Trees:
        """The `most` likeliest nodes. If there are no branches, each text's are one behind the other."""
        best = self._best(most)
        if not self._branches:
            best = [node for line in self._lines() for node in line if node in best]
        tokens, odds = [self._tokens[i] for i in best], [self._odds[i] for i in best]
        return Trees(tokens, self._parents_in(best), odds, [self._ranks.get(i) for i in best])

    def expected(self, most: int) -> float:
        """How many tokens a pass over the `most` likeliest nodes gives, by their odds."""
        return sum(self._odds[i] for i in self._best(most))

    def odds(self, nodes: Sequence[int]) -> float:
        """The sum of the odds of `nodes`."""
        return sum(self._odds[i] for i in nodes)

    def _parents_in(self, order: Sequence[int]) -> list[int]:
        """The parents of nodes as their places in `order`, which has the parents too."""
        place = {node: i for i, node in enumerate(order)}
        return [place.get(self._parents[node], self._parents[node]) for node in order]

    def _best(self, most: int) -> list[int]:
        nodes = range(len(self._tokens)) if self._branches else [node for line in self._lines() for node in line]
        return sorted(nodes, key=lambda i: (-self._odds[i], i))[:most]

    def _lines(self) -> list[list[int]]:
        """Of each text: the nodes from the root on, each followed by the likeliest of its children."""
        likeliest: dict[int, int] = {}
        for node, parent in enumerate(self._parents):
            if parent >= 0 and (parent not in likeliest or self._odds[node] > self._odds[likeliest[parent]]):
                likeliest[parent] = node
        lines = [[root] for root, parent in enumerate(self._parents) if parent < 0]
        for line in lines:
            while line[-1] in likeliest:
                line.append(likeliest[line[-1]])
        return lines

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
    """Up to `most` tokens that followed the last earlier place where the text read as it ends now.

    This is prompt-lookup decoding. Texts repeat names and code, and answers repeat their questions.
    """
    if most < 1:
        return []  # models that fit in RAM ask this for every token
    for n in range(LONGEST, SHORTEST - 1, -1):
        end = list(tokens[-n:])
        for at in range(len(tokens) - n - 1, -1, -1):
            if list(tokens[at : at + n]) == end:
                return list(tokens[at + n : at + n + most])
    return []
