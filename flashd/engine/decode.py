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
from flashd.engine.speculate import BEAM, NODES, Draft, Guesses, Pace, Tree, lookup
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

    def draft(self, tokens: Tokens, parents: Sequence[int]) -> Guesses: ...

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
    _start: int = 0  # where the cache has its node 0
    _checked: Floats = field(default_factory=lambda: NOTHING)  # [N, V] logits behind each of its nodes
    _drafting: bool = False
    _pace: Pace = field(default_factory=Pace)
    _looked_up: list[int] = field(default_factory=list)  # what should come next, as long as it was right

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
        tree = self._drafted(token, room)
        after = time.perf_counter()
        self._checked = self._forward(tree.tokens, figures, on_step, tree.parents)
        self._pace.measured_pass(time.perf_counter() - after)
        figures.passes += 1
        figures.drafted += len(tree.tokens) - 1
        figures.draft_seconds += after - started
        self.tokens.append(token)
        self._tree, self._node = tree, 0
        return np.asarray(self._checked[0], np.float32)

    def _walk(self, tree: Tree, token: int, figures: Figures) -> bool:
        """Goes on in the tree that was checked to the node that says `token`, if there is one."""
        node = tree.child(self._node, token)
        promised = tree.promised(self._node)
        if promised:
            self._pace.measured_guesses(node is not None, promised)
        if self._looked_up:
            self._pace.measured_lookup(self._looked_up[0] == token)
            self._looked_up = self._looked_up[1:] if self._looked_up[0] == token else []
        if node is None:
            return False
        # node i of the tree lies i places behind node 0; no node lies before its place in line
        slot, place = self._start + node, len(self.tokens)
        if slot != place:
            self.model.cache.move(slot, place)
        figures.accepted += 1
        self.tokens.append(token)
        self._node = node
        return True

    def _drafted(self, token: int, room: int) -> Tree:
        """What the next pass checks: `token`, and guesses at up to `room` tokens behind it."""
        self._start = len(self.tokens)
        most = min(NODES, self.model.cache.context - self._start)
        draft, self._looked_up = Draft(token, self._pace.trust), []
        if self._drafting and self.model.pages:
            self._looked_up = lookup([*self.tokens, token], min(room, most - 1))
            draft.follow(self._looked_up, self._pace.looked_up)
            if self.model.drafts:
                self._draft_from_ram(draft, room, most)
        return draft.tree(most)

    def _draft_from_ram(self, draft: Draft, room: int, most: int) -> None:
        """Lets a draft grow by what RAM alone says. The cache is left as it was."""
        steps = 0
        while (nodes := draft.likeliest(min(BEAM, most), room)) and self._pace.goes_on(draft, steps, nodes):
            started = time.perf_counter()
            tokens, parents = draft.asked(nodes)
            draft.grow(nodes, self.model.draft(np.array(tokens, np.int64), parents))
            self._pace.measured_draft(time.perf_counter() - started)
            steps, most = steps + 1, most - len(nodes)
        self.model.cache.truncate(len(self.tokens))

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
