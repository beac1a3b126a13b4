"""One text that grows: its tokens, how it is drawn and when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashd.bundle.row_kinds import Floats
from flashd.engine.decoding.drafts import Draft, Trees
from flashd.engine.decoding.sampling import Sampler
from flashd.engine.model.branches import Slots
from flashd.engine.model.contract import CardStats

NO_SLOTS: Slots = np.empty(0, np.int64)

MOST_TEXTS = 8
"""That grow together: half of the nodes of a pass are left for guesses."""


@dataclass
class Figures:
    """What one answer cost. Seconds, bytes and counts; a pass that others share counts for each of them."""

    prompt_tokens: int = 0  # computed
    reused_tokens: int = 0  # found in RAM or in a snapshot
    snapshot_bytes: int = 0  # read of it
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_card_bytes: int = 0
    decode_card_bytes: int = 0
    decode_card_reads: int = 0
    card_wait_seconds: float = 0.0
    forward_seconds: float = 0.0
    draft_seconds: float = 0.0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: str = "length"  # or context, where that is full before; stop, where it came to its own end

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds and self.tokens > 1 else 0.0


@dataclass(frozen=True)
class End:
    """What a draft goes on from: a text as it stands, or as it is about to."""

    tokens: list[int]
    slots: Slots  # of those that have been through the model
    room: int  # tokens that may follow


@dataclass(frozen=True)
class Guessed:
    """A draft behind each of some texts."""

    texts: list[list[int]]
    draft: Draft
    looked_up: list[list[int]]  # of each text, what followed the same words before


class Line:
    """A text that grows: its tokens, and where the cache has those that have been through the model."""

    def __init__(
        self, prompt: Sequence[int], sampler: Sampler, limit: int, eos: Sequence[int], drafts: bool,
        figures: Figures, card: CardStats,
    ) -> None:  # fmt: skip
        self.tokens, self.figures, self.drafts = list(prompt), figures, drafts
        self.slots: Slots = NO_SLOTS
        self.behind: Floats | None = None  # [V] logits behind the prompt, until a token is drawn from them
        self.looked_up: list[int] = []  # what should come next, as long as it was right
        self.done = False
        self._prompt, self._sampler, self._limit, self._eos = len(prompt), sampler, limit, eos
        self._card, self._started = card, time.perf_counter()
        self._before = card.bytes_read
        self._at_first = (0, 0)

    @property
    def said(self) -> int:
        return len(self.tokens) - self._prompt

    @property
    def pending(self) -> list[int]:
        """Tokens that have not been through the model."""
        return self.tokens[len(self.slots) :]

    @property
    def to_come(self) -> int:
        """Slots of the cache that it needs yet at the most: the last token said needs none."""
        return self._prompt + self._limit - 1 - len(self.slots)

    @property
    def end(self) -> End:
        """Behind which a draft may go on."""
        return self._end_at(self.tokens, self.slots)

    def foreseen(self, trees: Trees, node: int, past: int, likely: Floats) -> End | None:
        """The end that it will have if a token that is likely is drawn; None where it ends, or that cannot be told.

        Args:
            node: behind which it goes on.
            past: the slot of the first node.
            likely: logits [T, n] of the likely tokens behind each node.
        """
        sampler, tokens, slots = self._sampler.twin(), list(self.tokens), [past + node]
        if sampler is None:
            return None
        # what a penalty looks at may be a token of those that are not known yet
        logits = np.full(max(likely.shape[1], *tokens) + 1, -np.inf, np.float32)
        child: int | None = node
        while child is not None:
            logits[: likely.shape[1]] = likely[child]
            token = sampler.pick(logits, tokens)
            tokens.append(token)
            if token in self._eos or len(tokens) - self._prompt >= self._limit:
                return None
            child = trees.child(child, token)
            slots += [] if child is None else [past + child]
        return self._end_at(tokens, np.append(self.slots, slots))

    def _end_at(self, tokens: list[int], slots: Slots) -> End:
        return End(tokens, slots, self._prompt + self._limit - len(tokens) - 1 if self.drafts else 0)

    def found(self, slots: Slots) -> None:
        """The cache has the prompt's first tokens already."""
        self.slots = slots
        self.figures.reused_tokens, self.figures.prompt_tokens = len(slots), self._prompt - len(slots)

    def append(self, *slots: int) -> None:
        """The next tokens went through the model."""
        self.slots = np.append(self.slots, slots)

    def read(self, logits: Floats) -> None:
        """The prompt is in the cache, and these are the logits [V] behind it."""
        self.behind = logits
        self.figures.prefill_seconds = time.perf_counter() - self._started
        self.figures.prefill_card_bytes = self._card.bytes_read - self._before

    def draw(self, logits: Floats) -> int | None:
        """The next token, by logits [V]; None where the text has ended."""
        token, f, card = self._sampler.pick(logits, self.tokens), self.figures, self._card
        seconds = time.perf_counter() - self._started
        if self.said == 0:
            f.first_token_seconds, self._at_first = seconds, (card.bytes_read, card.reads)
        f.decode_seconds = seconds - f.first_token_seconds
        f.decode_card_bytes = card.bytes_read - self._at_first[0]
        f.decode_card_reads = card.reads - self._at_first[1]
        if token in self._eos:
            f.finish, self.done = "stop", True
            return None
        self.tokens.append(token)
        f.tokens = self.said
        self.done = self.said >= self._limit
        return token
