"""The texts that grow together: what of them is in the KV cache, and the passes that they share."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.engine.cache.prefixes import Prefixes
from flashd.engine.cache.snapshot import RUN, shared
from flashd.engine.decoding.drafting.draft_model import DraftModel
from flashd.engine.decoding.drafting.drafter import Drafter
from flashd.engine.decoding.drafting.drafts import Trees
from flashd.engine.decoding.line import Figures, Foresight, Line, longest_shared, settle
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.contract import Meanwhile, Model, OnStep, Tokens, silent
from flashd.errors import PromptTooLong, UsageError

QUIET_SECONDS = 20.0
"""A session is written once it has paused for so long: each turn of it would wear the card."""

Rows = dict[int, Floats]
"""Logits [V] by the number of the row."""


@dataclass
class Conversation:
    """The texts that grow, and the last text's tokens, whose keys and values stay in the cache.

    So the next turn of a chat computes only what is new. With `prefixes`, what prompts often begin with is kept in
    files too and outlives the process. With `small`, a smaller model makes the guesses that passes check.
    """

    model: Model
    prefixes: Prefixes | None = None
    small: DraftModel | None = None
    tokens: list[int] = field(default_factory=list)  # those of the last text that are in the cache, when none grows
    lines: list[Line] = field(default_factory=list)  # the texts that grow
    _asked: list[int] = field(default_factory=list)  # the last prompt, which `tokens` begins with
    _behind: Floats | None = None  # [V] logits behind the last prompt
    _goes_on: bool = False  # whether the last prompt begins with the one before it, as in a chat
    _learnt: bool = True  # whether `prefixes` has been told of the last prompt
    _drafter: Drafter = field(init=False)
    _session: str | None = None  # the one that `tokens` belong to, if it is not on the card yet
    _ended: float = 0.0  # when that text ended

    def __post_init__(self) -> None:
        self._drafter = Drafter(self.model, self.small)

    def begin(
        self, prompt: Sequence[int], sampler: Sampler, *, limit: int, eos: Sequence[int], figures: Figures,
        drafts: bool = True, session: str | None = None,
    ) -> Line:  # fmt: skip
        """Starts a text. Others may be growing: ask `fits` first. Call `end` when it is done.

        The text grows up to an end token, `limit` tokens or a full context. Tokens of the prompt that are in the
        cache already are not computed again.

        Args:
            prompt: the tokens that the text begins with.
            sampler: draws the text's tokens.
            limit: the most tokens that follow the prompt.
            eos: the tokens that end the text.
            figures: is filled with what the text costs.
            drafts: whether guesses are made for it.
            session: the talk that it belongs to, which `remember` keeps on the card.

        Raises UsageError if the prompt is empty, PromptTooLong if it leaves no room in the context.
        """
        self._check(prompt)
        room = self.model.cache.context - len(prompt)
        if room < limit:
            limit, figures.finish = room, "context"
        line = Line(prompt, sampler, limit, eos, drafts, figures, self.model.card)
        line.session, line.number = session, len(self.lines)
        if self.lines:
            # from now on it holds what it shares with another text, which may end before the next pass
            self._share(line)
        else:
            parts_at = self._parts_at(prompt)
            logits = self._recall(prompt, figures)
            line.found(np.arange(len(self.tokens)))
            # at the end of a pass, so that no pass is added
            passes = max(0, parts_at - len(self.tokens)) // self.model.pass_tokens
            line.mark = len(self.tokens) + passes * self.model.pass_tokens
            self.model.cache.hold(len(prompt))
            if logits is not None:
                self._is_read(line, logits)
        self.lines.append(line)
        return line

    def fits(self, prompt: Sequence[int], limit: int) -> bool:
        """Whether one more text may grow, and the context has room for all that each may still say."""
        if not self.lines:
            return True
        free = self.model.cache.context - self.model.cache.length - sum(line.to_come for line in self.lines)
        here, _ = longest_shared(self.lines, prompt[:-1], self.model.cache)
        return len(self.lines) < self.model.texts and len(prompt) - len(here) + limit <= free

    def end(self, line: Line) -> None:
        """Takes a text out of those that grow. The cache forgets what no other text shares.

        If it was the last, the cache keeps all of its tokens that went through the model.
        """
        self.lines.remove(line)
        if self.small:
            self.small.end(line)
        if self.lines:
            settle(self.lines, self.model.cache)
            return
        self.model.cache.keep(line.slots, {line.number: len(line.slots)})
        self.tokens = line.tokens[: len(line.slots)]
        self._session, self._ended = line.session, time.monotonic()
        if self.tokens[: len(self._asked)] != self._asked:
            self._asked, self._behind = [], None

    def go_on(self, on_step: OnStep = silent) -> Generator[tuple[Line, int]]:
        """Runs one pass for all texts and yields the tokens of each as they are drawn. Close the generator.

        If the logits behind a prompt are known already, its first token comes before the pass. Set `done` of a text
        that should say no more. Raises CardError, DamagedRun; all texts are then as they were.
        """
        for line in self.lines:
            if line.behind is not None and not line.done:
                logits, line.behind = line.behind, None
                if (token := line.draw(logits)) is not None:
                    yield line, token
        lines = [line for line in self.lines if not line.done]
        if lines:
            try:
                yield from self._pass(lines, on_step)
            finally:
                settle(self.lines, self.model.cache)

    def logits(self, tokens: Sequence[int], figures: Figures, on_step: OnStep = silent) -> Floats:
        """Logits [V] behind `tokens`. Those of the tokens that are in the cache already are not computed again.

        Raises PromptTooLong if they do not fit in the context; CardError, DamagedRun.
        """
        line = self.begin(tokens, Sampler(Sampling()), limit=1, eos=(), figures=figures)
        try:
            while line.behind is None:
                for _ in self.go_on(on_step):
                    """While a prompt is read no token is drawn."""
            return line.behind
        finally:
            self.end(line)

    def remember(self, leaving: bool = False) -> None:
        """Writes to the card that part of the last prompt which is likely to come again.

        If `leaving`, a chat is written in full, since its next turn will begin with it. Call this when nobody waits
        for an answer.
        """
        if self.prefixes is None:
            return
        if self._session is not None and (leaving or time.monotonic() - self._ended >= QUIET_SECONDS):
            self.prefixes.keep(self.tokens, self.model.cache, self._session)
            self._session = None
        if self._behind is None:
            return
        if not self._learnt:
            self._learnt = True
            self.prefixes.learn(self._asked, self.model.cache, self._behind)
        if leaving and self._goes_on:
            self.prefixes.keep(self.tokens, self.model.cache)

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise UsageError("the prompt is empty; say what to answer")
        if len(prompt) >= self.model.cache.context:
            raise PromptTooLong(len(prompt), self.model.cache.context - 1)

    def _recall(self, prompt: Sequence[int], figures: Figures) -> Floats | None:
        """Keeps in the cache, or reads from a snapshot, as much of the beginning of `prompt` as there is.

        Returns the logits [V] behind the prompt. If they are not known it returns None, and the cache lacks at least
        the prompt's last token.
        """
        prompt, cache, asked = list(prompt), self.model.cache, self._asked
        logits = self._behind if asked == prompt else None
        self._goes_on = bool(asked) and len(asked) + RUN <= len(prompt) and prompt[: len(asked)] == asked
        self._asked, self._behind = [], None
        cache.truncate(shared(self.tokens, prompt))
        if cache.length < len(prompt):  # the states behind it are not known any more
            logits = None
        try:
            if logits is None and self.prefixes is not None:
                logits, read = self.prefixes.restore(prompt, cache)
                figures.snapshot_bytes += read
            if logits is None:
                cache.truncate(min(cache.length, len(prompt) - 1))
        finally:
            self.tokens[:] = prompt[: cache.length]
        return logits

    def _parts_at(self, prompt: Sequence[int]) -> int:
        """How many tokens `prompt` shares with texts before it. Where it parts from them others may part from it.

        Only models whose texts cannot be cut anywhere ask for it.
        """
        if not self.model.cache.state_bytes:
            return 0
        return max(shared(self.tokens, prompt), self.prefixes.common(prompt) if self.prefixes else 0)

    def _share(self, line: Line) -> None:
        """Begins a text that joins others with what it shares with one of them."""
        prompt, cache, logits = line.tokens, self.model.cache, None
        here, of = longest_shared(self.lines, prompt[:-1], cache)
        if cache.state_bytes and self._behind is not None and prompt == self._asked:
            # behind all of it the states may be known, and before its last token they are not
            whole, other = longest_shared(self.lines, prompt, cache)
            if len(whole) == len(prompt):
                here, of, logits = whole, other, self._behind
        cache.share(line.number, of, len(here))
        line.found(here)
        if logits is not None:
            self._is_read(line, logits)

    def _is_read(self, line: Line, logits: Floats) -> None:
        """Notes that a prompt has been read, and the logits [V] behind it."""
        line.read(logits)
        self.model.cache.mark(line.number)
        self._asked, self._behind, self._learnt = list(line.tokens), logits, False

    def _pass(self, lines: Sequence[Line], on_step: OnStep) -> Iterator[tuple[Line, int]]:
        """Runs a pass: it reads the next part of prompts, and the other texts go on as far as guesses are right."""
        speaking, reading = [x for x in lines if x.said], [x for x in lines if not x.said]
        chunks = self._chunks(reading, self.model.pass_tokens - (self.model.nodes if speaking else 0))
        past = self.model.cache.length
        if not speaking and not chunks:
            return  # all that is left of a prompt was there
        room = self.model.cache.context - past - sum(len(chunk) for _, chunk in chunks)
        trees = self._drafter.trees(speaking, min(self.model.nodes - len(chunks), room), on_step)
        logits = self._forward(speaking, trees, chunks, on_step)
        end = past + len(trees.tokens)
        for i, (line, chunk) in enumerate(chunks, len(trees.tokens)):
            line.append(*range(end, end + len(chunk)))
            end += len(chunk)
            if not line.pending:
                self._is_read(line, logits[i])
            elif len(line.slots) == line.mark:
                self.model.cache.mark(line.number)
        for text, line in enumerate(speaking):
            # not earlier: the caller may stop in between, and a text that nothing was drawn of must be as it was
            line.append(past + trees.root(text))
            yield from self._walk(line, trees, trees.root(text), past, logits)

    def _chunks(self, reading: Sequence[Line], most: int) -> list[tuple[Line, list[int]]]:
        """The next tokens of each prompt, `most` in all."""
        chunks = []
        # with an empty cache GroupQueryAttention takes slots for positions, so only one prompt is read then
        for line in reading if self.model.cache.length else reading[:1]:
            if not len(line.slots):
                self._share(line)
            if chunk := line.pending[:most]:
                chunks.append((line, chunk))
                most -= len(chunk)
        return chunks

    def _walk(self, line: Line, trees: Trees, node: int, past: int, logits: Rows) -> Iterator[tuple[Line, int]]:
        """Draws a text's tokens from `node` of its tree on, as long as they are in the tree and have logits."""
        while not line.done and (token := line.draw(logits[node])) is not None:
            yield line, token
            child = self._drafter.drawn(line, trees, node, token)
            if child is None or child not in logits or line.done:
                return
            line.append(past + child)
            line.figures.accepted += 1
            node = child

    def _forward(
        self, speaking: Sequence[Line], trees: Trees, chunks: Sequence[tuple[Line, list[int]]], on_step: OnStep
    ) -> Rows:
        """Logits [V] by number: behind nodes of the trees, and then behind the last token of each chunk.

        Where the pass has many nodes, those that are not drawn behind have none.
        """
        lines = [*speaking, *(line for line, _ in chunks)]
        tokens, parents, wanted = list(trees.tokens), list(trees.parents), list(range(len(trees.tokens)))
        for text, (_, chunk) in enumerate(chunks, len(speaking)):
            parents += [behind(text), *range(len(tokens), len(tokens) + len(chunk) - 1)]
            tokens += chunk
            wanted.append(len(tokens) - 1)
        # every model takes tokens that form one line behind all that is in the cache
        whole = lines[0].number == 0 and len(lines[0].slots) == self.model.cache.length
        in_line = whole and parents == [behind(0), *range(len(tokens) - 1)]
        texts, numbers = [line.slots for line in lines], [line.number for line in lines]
        branches = None if in_line else Branches(texts, parents, numbers)
        foresight = Foresight(speaking, trees, self.model.cache.length)
        rows = np.arange(len(wanted))

        def finish(likely: Floats) -> Tokens:
            nonlocal rows
            self._drafter.learn(trees, likely)
            rows = foresight.rows(likely)
            return rows

        started, waited = time.perf_counter(), self.model.card.waited
        meanwhile: Meanwhile = nullcontext
        drafts = self._drafter.works_for(speaking)
        if not chunks and drafts and self._drafter.works_ahead:
            meanwhile = partial(self._drafter.ahead, foresight)
        logits = self.model.forward(
            np.array(tokens, np.int64), np.array(wanted), on_step, branches, meanwhile, finish if drafts else None
        )
        seconds = time.perf_counter() - started
        for line in lines:
            line.figures.forward_seconds += seconds
            line.figures.card_wait_seconds += self.model.card.waited - waited
        for line in speaking:
            line.figures.passes += 1
        (self._drafter.read if chunks else self._drafter.passed)(len(tokens), seconds)
        return dict(zip(rows.tolist(), logits, strict=True))
