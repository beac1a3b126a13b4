"""A small model of the same tokenizer, all of it in RAM, that guesses what a large one says next.

It reads a text as the large model does, and keeps what it has read. If guesses were wrong it forgets them and goes on
behind what the large model said. It never decides what is said. So a card that is gone, or a text that is too long
for it, means no guesses, and no error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.engine.cache.snapshot import shared
from flashd.engine.forward.resident import ResidentModel
from flashd.engine.model.contract import Guesses, OnStep, silent
from flashd.engine.model.kv_cache import KvCache
from flashd.engine.model.sizes import MOST_TEXTS
from flashd.engine.planning.plan import Plan
from flashd.errors import CardError
from flashd.system.freed_memory import PAGE, give_back_freed_memory

log = logging.getLogger(__name__)

NONE = Guesses(np.empty((1, 0), np.int64), np.empty((1, 0), np.float32))
"""No guess."""


@dataclass(eq=False)
class _Read:
    """What the small model has read of a text."""

    cache: KvCache
    tokens: list[int] = field(default_factory=list)  # those in the cache
    held: int = 0  # slots of the cache that memory is held for
    text: Hashable = None  # None: the text has ended; the next turn of its chat may begin with it


class DraftModel:
    """Guesses at what follows texts, of which it keeps what it has read.

    Args:
        bundle: the open bundle of a model that stays whole. The caller closes it.
        plan: see planning.draft.
        vocabulary: the tokens of the large model. Others are not guessed.
        on_step: is told how far loading has come.

    Raises DamagedRun, CardError while it loads.
    """

    def __init__(self, bundle: Bundle, plan: Plan, vocabulary: int, on_step: OnStep = silent) -> None:
        self._architecture = bundle.header.model
        self._model = ResidentModel(bundle, plan, on_step)
        self._vocabulary = vocabulary
        self._texts = [_Read(self._model.cache)]
        # a head's part of a cache begins and ends within pages that hold nothing else
        self._wasted = -(-2 * PAGE // (4 * self._architecture.head_dim))  # tokens, for each cache but the first
        # a state takes memory from the start
        self._most_texts = 1 if self._model.cache.state_bytes else MOST_TEXTS
        self._silent = False

    def guesses(self, tokens: Sequence[int], text: Hashable, most: int, on_part: Callable[[], None]) -> Guesses:
        """Up to `most` guesses [1, m] at what follows the `tokens` of a text. There may be none.

        Args:
            tokens: all of the text, with those guesses that are taken for right.
            text: which text it is. What was read of it is kept until `end`.
            on_part: is called when some layers have read a part of the text. It may raise to stop.

        Raises DamagedRun.
        """
        read = self._of(tokens, text)
        if read is None or max(tokens) >= self._architecture.vocabulary:
            return NONE
        self._model.use(read.cache)
        try:
            return self._guesses(read, tokens, most, on_part)
        except CardError as error:
            if not self._silent:
                log.warning("no drafts: %s", error)
            self._silent = True
            return NONE
        finally:
            # of a pass that broke off nothing is counted
            read.tokens = list(tokens[: read.cache.length])

    def unread(self, tokens: Sequence[int], text: Hashable) -> int:
        """How many tokens of a text would have to be read before guesses follow."""
        read = next((read for read in self._texts if read.text == text), None)
        return len(tokens) - (shared(read.tokens, tokens) if read else 0)

    def end(self, text: Hashable) -> None:
        """Says that a text has ended. What was read of it stays until its place is wanted."""
        for read in self._texts:
            if read.text == text:
                read.text = None

    def close(self) -> None:
        self._model.close()

    def _guesses(self, read: _Read, tokens: Sequence[int], most: int, on_part: Callable[[], None]) -> Guesses:
        # the last one is always read again: the logits behind it were not kept
        read.cache.truncate(shared(read.tokens, tokens[:-1]))
        start = read.cache.length
        step = self._model.pass_tokens
        for at in range(start, len(tokens), step):
            part = np.array(tokens[at : at + step], np.int64)
            logits = self._model.likely(part, lambda done, layers, nbytes: on_part())
        if len(tokens) - start > step:
            give_back_freed_memory()
        self._silent = False
        return Guesses.of(logits[:, : self._vocabulary], most)

    def _of(self, tokens: Sequence[int], text: Hashable) -> _Read | None:
        """Where a text is read, with memory held for all of it. None if there is no room."""
        read = next((read for read in self._texts if read.text == text), None) or self._free(tokens)
        if read is None:
            return None
        want = len(tokens) + 1
        if want > read.held:
            if self._held(read) + want > self._model.cache.context:
                self._release(read)
            if self._held(read) + want > self._model.cache.context:
                return None
            read.cache.reserve(want)
            read.held = want
        read.text = text
        return read

    def _free(self, tokens: Sequence[int]) -> _Read | None:
        """A place for a text that was not read before: the one with the text that it goes on from, if it is there."""
        ended = [read for read in self._texts if read.text is None]
        best = max(ended, key=lambda read: shared(read.tokens, tokens), default=None)
        if best is not None or len(self._texts) >= self._most_texts:
            return best
        self._texts.append(_Read(KvCache(self._architecture, self._model.cache.context)))
        return self._texts[-1]

    def _held(self, but: _Read) -> int:
        """Tokens that all texts but one hold memory for."""
        return sum(read.held + self._wasted for read in self._texts if read is not but and read.held)

    def _release(self, but: _Read) -> None:
        """Gives back what no text needs: that of texts that have ended, and what is behind the ends of others."""
        for read in self._texts:
            if read is not but:
                if read.text is None:
                    read.cache.truncate(0)
                    read.tokens = []
                read.cache.hold(read.cache.length)
                read.held = read.cache.length
