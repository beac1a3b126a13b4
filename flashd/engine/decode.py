"""Prompt in, tokens out: prefill in chunks, then one token or, drafted from RAM, several for each pass.

Every token is drawn from the exact model's logits at its place; a draft only decides which places a pass looks
at. So with drafts or without, the same seed gives the same text.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flashd.bundle.rows import Floats
from flashd.engine.card import CardStats
from flashd.engine.ffn import OnStep, silent
from flashd.engine.graph import Tokens
from flashd.engine.kv import KvCache
from flashd.engine.plan import PREFILL_TOKENS
from flashd.engine.prefixes import Prefixes
from flashd.engine.sample import Sampler
from flashd.engine.snapshot import RUN, shared
from flashd.engine.speculate import NODES, DraftLength, Tree, lookup
from flashd.errors import UsageError

NOTHING: Floats = np.empty((0, 0), np.float32)


class Model(Protocol):
    """A forward pass over a KV cache: PagedModel or ResidentModel."""

    cache: KvCache

    @property
    def card(self) -> CardStats: ...

    @property
    def hit_rate(self) -> float: ...

    @property
    def pages(self) -> bool: ...

    @property
    def drafts(self) -> bool: ...

    def draft(self, token: int, most: int) -> list[int]: ...

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, parents: Sequence[int] | None = None
    ) -> Floats: ...

    def close(self) -> None: ...


@dataclass
class Figures:
    """What one answer cost. Seconds, bytes and counts."""

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
    finish: str = "length"

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds and self.tokens > 1 else 0.0


@dataclass
class Conversation:
    """The tokens whose keys and values are in the cache, so that a chat pays only for what is new.

    With `prefixes`, what prompts often begin with is in files too, and outlives the process.
    """

    model: Model
    prefixes: Prefixes | None = None
    tokens: list[int] = field(default_factory=list)
    _asked: list[int] = field(default_factory=list)  # the last prompt, with which `tokens` begins
    _behind: Floats | None = None  # [V] logits behind it
    _goes_on: bool = False  # it begins with the one before it: a chat
    _learnt: bool = True
    _tree: Tree | None = None  # what the last pass checked
    _node: int = 0  # how far in it the answer has come
    _checked: Floats = field(default_factory=lambda: NOTHING)  # [N, V] logits behind each of its nodes
    _drafting: bool = False
    _looked_up: DraftLength = field(default_factory=DraftLength)
    _from_ram: DraftLength = field(default_factory=DraftLength)
    _by_lookup: bool = False

    def generate(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        limit: int,
        eos: Sequence[int],
        figures: Figures,
        drafts: bool = True,
        on_step: OnStep = silent,
    ) -> Generator[int]:
        """The tokens that follow `prompt`, as they come, up to an end token, `limit` or a full context.

        What of the prompt is in the cache already is not computed again. Closing the iterator early leaves the
        cache holding exactly what was said.

        Raises UsageError where the prompt is empty or leaves no room in the context; CardError, DamagedRun.
        """
        self._check(prompt)
        context = self.model.cache.context
        started = time.perf_counter()
        logits = self._prefill(prompt, figures, on_step)
        figures.prefill_seconds = time.perf_counter() - started
        self._drafting = drafts
        card = self.model.card
        at_first = (card.bytes_read, card.reads)
        try:
            for count in range(1, min(limit, context - len(prompt)) + 1):
                token = sampler.pick(logits, self.tokens)
                figures.decode_card_bytes = card.bytes_read - at_first[0]
                figures.decode_card_reads = card.reads - at_first[1]
                if count == 1:
                    figures.first_token_seconds = time.perf_counter() - started
                figures.decode_seconds = time.perf_counter() - started - figures.first_token_seconds
                if token in eos:
                    figures.finish = "stop"
                    return
                figures.tokens = count
                yield token
                if count < limit and len(self.tokens) + 1 < context:
                    logits = self._next(token, min(limit - count, context - len(self.tokens)) - 1, figures, on_step)
        finally:
            self._forget_drafts()

    def logits(self, tokens: Sequence[int], figures: Figures, on_step: OnStep = silent) -> Floats:
        """Logits [V] behind `tokens`; what of them is in the cache already is not computed again.

        Raises UsageError where they do not fit in the context; CardError, DamagedRun.
        """
        self._check(tokens)
        return self._prefill(tokens, figures, on_step)

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise UsageError("the prompt is empty; say what to answer")
        if len(prompt) >= self.model.cache.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context room for {self.model.cache.context - 1};"
                " shorten it or raise the context"
            )

    def _next(self, token: int, room: int, figures: Figures, on_step: OnStep) -> Floats:
        """Logits [V] behind `token`: from the last pass if that had drafted it, else from a new one."""
        if self._tree is not None and self._walk(self._tree, token, figures):
            return np.asarray(self._checked[self._node], np.float32)
        self._forget_drafts()
        started = time.perf_counter()
        free = self.model.cache.context - len(self.tokens)
        tree = Tree.grown(
            token, self._draft(token, room) if self._drafting and self.model.pages else [], min(NODES, free)
        )
        after = time.perf_counter()
        self._checked = self._forward(tree.tokens, figures, on_step, tree.parents)
        if tree.links:
            self._length.measured_draft(tree.links, after - started)
        done = time.perf_counter()
        for length in (self._looked_up, self._from_ram):
            length.measured_pass(done - after)
        figures.passes += 1
        figures.drafted += len(tree.tokens) - 1
        figures.draft_seconds += after - started
        self.tokens.append(token)
        self._tree, self._node = tree, 0
        return np.asarray(self._checked[0], np.float32)

    def _walk(self, tree: Tree, token: int, figures: Figures) -> bool:
        """Goes on in the tree that was checked to the node that says `token`, if there is one."""
        node, next_link = tree.child(self._node, token), self._node + 1
        if tree.is_guessed(self._node):
            self._length.measured_token(node == next_link, node not in (None, next_link))
        if node is None:
            return False
        # node i of the tree lies i places behind node 0, and of a branch's nodes only the chain's already lie in line
        if node != next_link:
            start = len(self.tokens) - next_link
            self.model.cache.move(start + node, start + next_link)
        figures.accepted += 1
        self.tokens.append(token)
        self._node = node
        return True

    @property
    def _length(self) -> DraftLength:
        """The measure of the kind of draft that was made last."""
        return self._looked_up if self._by_lookup else self._from_ram

    def _draft(self, token: int, room: int) -> list[list[int]]:
        """Guesses at each of up to `room` tokens behind `token`: what followed earlier, or what RAM alone says."""
        found = lookup([*self.tokens, token], min(room, self._looked_up.choose()))
        self._by_lookup = bool(found)
        if found or not self.model.drafts:
            return [[guess] for guess in found]
        return self._draft_from_ram(token, min(room, self._from_ram.choose()))

    def _draft_from_ram(self, token: int, most: int) -> list[list[int]]:
        """The cache is left as it was."""
        out: list[list[int]] = []
        for _ in range(most):
            # more than a tree takes of one place, unless that is its only one
            out.append(self.model.draft(out[-1][0] if out else token, NODES - most))
        self.model.cache.truncate(len(self.tokens))
        return out

    def _forget_drafts(self) -> None:
        """Takes tokens that were drafted and not said out of the cache."""
        self._tree, self._checked = None, NOTHING
        self.model.cache.truncate(len(self.tokens))

    def remember(self, leaving: bool = False) -> None:
        """Writes to the card what of the last prompt is likely to come again; `leaving`: of a chat all that was said.

        Call it when nobody waits for an answer.
        """
        if self.prefixes is None or self._behind is None:
            return
        if not self._learnt:
            self._learnt = True
            self.prefixes.learn(self._asked, self.model.cache, self._behind)
        if leaving and self._goes_on:
            self.prefixes.keep(self.tokens, self.model.cache)

    def _prefill(self, prompt: Sequence[int], figures: Figures, on_step: OnStep) -> Floats:
        before = self.model.card.bytes_read
        logits = self._recall(prompt, figures)
        kept = len(self.tokens)
        self.model.cache.hold(len(prompt))
        figures.prompt_tokens, figures.reused_tokens = len(prompt) - kept, kept
        for start in range(kept, len(prompt), PREFILL_TOKENS):
            chunk = prompt[start : start + PREFILL_TOKENS]
            logits = np.asarray(self._forward(chunk, figures, on_step)[0], np.float32)
            self.tokens.extend(chunk)
        figures.prefill_card_bytes = self.model.card.bytes_read - before
        assert logits is not None
        self._asked, self._behind, self._learnt = list(prompt), logits, False
        return logits

    def _recall(self, prompt: Sequence[int], figures: Figures) -> Floats | None:
        """Leaves in the cache what `prompt` begins with, from RAM or a snapshot.

        Returns the logits [V] behind the prompt where they are known; else its last token is left to compute.
        """
        prompt, cache, asked = list(prompt), self.model.cache, self._asked
        logits = self._behind if asked == prompt else None
        self._goes_on = bool(asked) and len(asked) + RUN <= len(prompt) and prompt[: len(asked)] == asked
        self._asked, self._behind = [], None
        cache.truncate(shared(self.tokens, prompt))
        try:
            if logits is None and self.prefixes is not None:
                logits, read = self.prefixes.restore(prompt, cache)
                figures.snapshot_bytes += read
            if logits is None:
                cache.truncate(min(cache.length, len(prompt) - 1))
        finally:
            self.tokens[:] = prompt[: cache.length]
        return logits

    def _forward(
        self, tokens: Sequence[int], figures: Figures, on_step: OnStep, parents: Sequence[int] | None = None
    ) -> Floats:
        """Logits [1, V] behind the last of `tokens`, or with `parents` [T, V] behind each node of a tree."""
        started, waited = time.perf_counter(), self.model.card.waited
        wanted = np.array([len(tokens) - 1]) if parents is None else np.arange(len(tokens))
        # a tree of one node is a line, which every model takes
        tree = parents if parents and len(parents) > 1 else None
        logits = self.model.forward(np.array(tokens, np.int64), wanted, on_step, tree)
        figures.forward_seconds += time.perf_counter() - started
        figures.card_wait_seconds += self.model.card.waited - waited
        return logits
