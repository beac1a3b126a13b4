"""One text that grows: its tokens, how they are drawn, when it ends and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.engine.cache.snapshot import shared
from flashd.engine.decoding.drafting.drafts import Draft, Trees
from flashd.engine.decoding.sampling import Sampler
from flashd.engine.model.branches import CacheSlots
from flashd.engine.model.contract import CardStats, Tokens
from flashd.engine.model.distinct import distinct
from flashd.engine.model.kv_cache import KvCache
from flashd.engine.model.sizes import LOGIT_ROWS

NO_SLOTS: CacheSlots = np.empty(0, np.int64)


@dataclass
class Figures:
    """What one answer cost, in seconds, bytes and counts. A pass that answers share counts in full for each."""

    prompt_tokens: int = 0  # those of the prompt that were computed
    reused_tokens: int = 0  # those of the prompt that were in RAM or in a snapshot
    snapshot_bytes: int = 0  # read from snapshots
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_card_bytes: int = 0
    decode_card_bytes: int = 0
    decode_card_reads: int = 0
    decode_table_bytes: int = 0  # read of tables that single rows are read of, such as the embeddings
    card_wait_seconds: float = 0.0
    forward_seconds: float = 0.0
    draft_seconds: float = 0.0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: str = "length"  # or "context" if the context was full; "stop" if the answer came to its own end

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds and self.tokens > 1 else 0.0


@dataclass(frozen=True)
class End:
    """The end of a text, which a draft goes on from: as it is now, or as it will be after a pass."""

    line: Line
    tokens: list[int]  # the whole text
    slots: CacheSlots  # of the tokens that have been through the model
    room: int  # how many tokens may follow


@dataclass(frozen=True)
class Foreseen:
    """How a text will go on in a pass."""

    nodes: list[int]  # of its tree: those that it will draw behind, the root first; all if that is not known
    end: End | None  # None: it will be complete, or its sampler cannot draw ahead


@dataclass(frozen=True)
class Guessed:
    """The draft for some texts."""

    texts: list[list[int]]  # their tokens
    draft: Draft
    looked_up: list[list[int]]  # of each text: what followed the same words earlier in it
    steps: int  # of drafting that it took
    ahead: bool  # it was made during a pass
    waited: float = 0.0  # seconds that this pass waited for it


class Line:
    """A text that grows: its tokens, and the cache's slots of those that have been through the model.

    Args:
        prompt: the tokens that it begins with.
        sampler: draws the tokens that follow.
        limit: the most tokens that follow the prompt.
        eos: the tokens that end it.
        drafts: whether guesses are made for it.
        figures: is filled with what it costs.
        card: what the model has read so far.
    """

    def __init__(
        self, prompt: Sequence[int], sampler: Sampler, limit: int, eos: Sequence[int], drafts: bool,
        figures: Figures, card: CardStats,
    ) -> None:  # fmt: skip
        self.tokens, self.figures, self.drafts = list(prompt), figures, drafts
        self.slots: CacheSlots = NO_SLOTS
        self.number = 0  # of its states in the cache, which is its place among the texts that grow
        self.behind: Floats | None = None  # [V] logits behind the prompt, until a token is drawn from them
        self.looked_up: list[int] = []  # the tokens that should come next, as long as those before were right
        self.session: str | None = None  # the talk that it belongs to
        self.done = False
        self.mark = 0  # behind so many tokens of the prompt others are likely to part from it
        self._prompt, self._sampler, self._limit, self._eos = len(prompt), sampler, limit, eos
        self._card, self._started = card, time.perf_counter()
        self._before = card.bytes_read
        self._at_first = (0, 0, 0)

    @property
    def said(self) -> int:
        """How many tokens follow the prompt."""
        return len(self.tokens) - self._prompt

    @property
    def pending(self) -> list[int]:
        """Tokens that have not been through the model."""
        return self.tokens[len(self.slots) :]

    @property
    def to_come(self) -> int:
        """The most slots of the cache that it still needs. Its last token needs none."""
        return self._prompt + self._limit - 1 - len(self.slots)

    @property
    def end(self) -> End:
        """The text's end as it is now."""
        return self._end_at(self.tokens, self.slots)

    def foreseen(self, trees: Trees, text: int, past: int, likely: Floats) -> Foreseen:
        """How the text will go on in a pass, if the pass draws tokens of the first n.

        Args:
            trees: what the pass checks.
            text: its number among the texts of the pass.
            past: the slot of the first node.
            likely: logits [T, n] of the first n tokens of the vocabulary, behind each of the T nodes.
        """
        sampler, tokens, nodes = self._sampler.twin(), list(self.tokens), [trees.root(text)]
        if sampler is None:
            return Foreseen(trees.of_text(text), None)
        # a repeat penalty may look at tokens of the text that are not among the first n
        logits = np.full(max(likely.shape[1], *tokens) + 1, -np.inf, np.float32)  # [m], m > n
        child: int | None = nodes[0]
        while child is not None:
            logits[: likely.shape[1]] = likely[child]
            token = sampler.pick(logits, tokens)
            tokens.append(token)
            if token in self._eos or len(tokens) - self._prompt >= self._limit:
                return Foreseen(nodes, None)
            child = trees.child(child, token)
            nodes += [] if child is None else [child]
        slots = [past + node for node in nodes]
        return Foreseen(nodes, self._end_at(tokens, np.append(self.slots, slots)))

    def _end_at(self, tokens: list[int], slots: CacheSlots) -> End:
        return End(self, tokens, slots, self._prompt + self._limit - len(tokens) - 1 if self.drafts else 0)

    def found(self, slots: CacheSlots) -> None:
        """Says that the cache has the prompt's first tokens already, at `slots`."""
        self.slots = slots
        self.figures.reused_tokens, self.figures.prompt_tokens = len(slots), self._prompt - len(slots)

    def append(self, *slots: int) -> None:
        """Says that the next tokens went through the model and are at `slots`."""
        self.slots = np.append(self.slots, slots)

    def read(self, logits: Floats) -> None:
        """Says that the prompt is in the cache, and gives the logits [V] behind it."""
        self.behind = logits
        self.figures.prefill_seconds = time.perf_counter() - self._started
        self.figures.prefill_card_bytes = self._card.bytes_read - self._before

    def draw(self, logits: Floats) -> int | None:
        """Draws the next token by logits [V]. None if the text has ended."""
        token, f, card = self._sampler.pick(logits, self.tokens), self.figures, self._card
        seconds = time.perf_counter() - self._started
        if self.said == 0:
            f.first_token_seconds, self._at_first = seconds, (card.bytes_read, card.reads, card.table_bytes)
        f.decode_seconds = seconds - f.first_token_seconds
        f.decode_card_bytes = card.bytes_read - self._at_first[0]
        f.decode_card_reads = card.reads - self._at_first[1]
        f.decode_table_bytes = card.table_bytes - self._at_first[2]
        if token in self._eos:
            f.finish, self.done = "stop", True
            return None
        self.tokens.append(token)
        f.tokens = self.said
        self.done = self.said >= self._limit
        return token


class Foresight:
    """How the texts of a pass will go on in it. It is asked when the logits of likely tokens are known.

    Args:
        lines: the texts, a tree for each.
        trees: what the pass checks.
        past: the slot of the first node.
    """

    def __init__(self, lines: Sequence[Line], trees: Trees, past: int) -> None:
        self._lines, self._trees, self._past = lines, trees, past
        self._foreseen: list[Foreseen] = []

    def of(self, likely: Floats) -> list[Foreseen]:
        """Of each text, by logits [R, n] of likely tokens, whose first rows are behind the nodes."""
        if not self._foreseen:
            self._foreseen = [
                line.foreseen(self._trees, text, self._past, likely) for text, line in enumerate(self._lines)
            ]
        return self._foreseen

    def rows(self, likely: Floats) -> Tokens:
        """A Finish: the rows that texts will draw from, in order; all if there are few.

        Rows behind the nodes' are behind prompts.
        """
        if len(likely) <= LOGIT_ROWS:
            return np.arange(len(likely))
        prompts = list(range(len(self._trees.tokens), len(likely)))
        by_depth = zip_longest(*(foreseen.nodes for foreseen in self.of(likely)))
        nodes = [node for node in chain.from_iterable(by_depth) if node is not None]
        return np.array(sorted([*prompts, *nodes[: LOGIT_ROWS - len(prompts)]]))


def longest_shared(lines: Sequence[Line], tokens: Sequence[int], cache: KvCache) -> tuple[CacheSlots, int]:
    """The slots of the longest beginning that `tokens` share with a text that grows, and the number of that text.

    If layers have states, these are known behind it.
    """
    most, number = NO_SLOTS, 0
    for line in lines:
        same = cache.longest(shared(line.tokens[: len(line.slots)], tokens), line.number)
        if same > len(most):
            most, number = line.slots[:same], line.number
    return most, number


def settle(lines: Sequence[Line], cache: KvCache) -> None:
    """Removes from the cache the tokens that are in no text."""
    kept = distinct(np.concatenate([line.slots for line in lines]))
    cache.keep(kept, {line.number: len(line.slots) for line in lines})
    for number, line in enumerate(lines):
        line.slots, line.number = np.searchsorted(kept, line.slots), number
