"""Prompt in, tokens out: prefill in chunks, then one token or, drafted from RAM, several for each pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flashd.bundle.rows import Floats
from flashd.engine.card import CardStats
from flashd.engine.kv import KvCache
from flashd.engine.paged import OnStep, Tokens, silent
from flashd.engine.plan import PREFILL_TOKENS
from flashd.engine.sample import Sampler
from flashd.errors import UsageError


class Model(Protocol):
    """A forward pass over a KV cache: PagedModel or ResidentModel."""

    cache: KvCache

    @property
    def card(self) -> CardStats: ...

    @property
    def hit_rate(self) -> float: ...

    def forward(self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent) -> Floats: ...

    def close(self) -> None: ...


@dataclass
class Figures:
    """What one answer cost. Seconds, bytes and counts."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_card_bytes: int = 0
    decode_card_bytes: int = 0
    decode_card_reads: int = 0
    card_wait_seconds: float = 0.0
    forward_seconds: float = 0.0
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
    """The tokens whose keys and values are in the cache, so that a chat pays only for what is new."""

    model: Model
    tokens: list[int] = field(default_factory=list)

    def generate(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        limit: int,
        eos: Sequence[int],
        figures: Figures,
        on_step: OnStep = silent,
    ) -> Iterator[int]:
        """The tokens that follow `prompt`, as they come, up to an end token, `limit` or a full context.

        What of the prompt is in the cache already is not computed again.

        Raises UsageError where the prompt is empty or leaves no room in the context; CardError, DamagedRun.
        """
        context = self.model.cache.context
        if not prompt:
            raise UsageError("the prompt is empty; say what to answer")
        if len(prompt) >= context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context room for {context - 1};"
                " shorten it or raise --context"
            )
        started = time.perf_counter()
        logits = self._prefill(prompt, figures, on_step)
        figures.prefill_seconds = time.perf_counter() - started
        card = self.model.card
        at_first = (card.bytes_read, card.reads)
        for count in range(1, min(limit, context - len(prompt)) + 1):
            token = sampler.pick(logits, self.tokens)
            if count == 1:
                figures.first_token_seconds = time.perf_counter() - started
            figures.decode_seconds = time.perf_counter() - started - figures.first_token_seconds
            if token in eos:
                figures.finish = "stop"
                return
            figures.tokens = count
            yield token
            if count < limit and len(self.tokens) < context:
                logits = self._forward([token], figures, on_step)
                figures.decode_card_bytes = card.bytes_read - at_first[0]
                figures.decode_card_reads = card.reads - at_first[1]

    def _prefill(self, prompt: Sequence[int], figures: Figures, on_step: OnStep) -> Floats:
        # the last token is always computed: its logits are what is wanted
        kept = _shared(self.tokens, prompt[:-1])
        self.model.cache.truncate(kept)
        del self.tokens[kept:]
        figures.prompt_tokens, figures.reused_tokens = len(prompt) - kept, kept
        before = self.model.card.bytes_read
        logits = np.empty(0, np.float32)
        for start in range(kept, len(prompt), PREFILL_TOKENS):
            logits = self._forward(prompt[start : start + PREFILL_TOKENS], figures, on_step)
        figures.prefill_card_bytes = self.model.card.bytes_read - before
        return logits

    def _forward(self, tokens: Sequence[int], figures: Figures, on_step: OnStep) -> Floats:
        """Logits [V] behind the last of `tokens`."""
        started, waited = time.perf_counter(), self.model.card.waited
        logits = self.model.forward(np.array(tokens, np.int64), np.array([len(tokens) - 1]), on_step)
        self.tokens.extend(tokens)
        figures.forward_seconds += time.perf_counter() - started
        figures.card_wait_seconds += self.model.card.waited - waited
        return np.asarray(logits[0], np.float32)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
