"""Makes the guesses that passes check, before a pass or while one waits for the card."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.engine.decoding.background import Background
from flashd.engine.decoding.drafting.draft_model import DraftModel
from flashd.engine.decoding.drafting.drafts import BEAM, Draft, Trees, lookup
from flashd.engine.decoding.drafting.followers import Followers
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import End, Foresight, Guessed, Line
from flashd.engine.model.branches import Branches
from flashd.engine.model.contract import Model, OnStep, silent
from flashd.engine.model.sizes import NODES
from flashd.engine.planning.parts import LIKELY


class Drafter:
    """The guesses for the texts of a conversation, from all that can guess.

    Args:
        model: the model whose passes check them.
        small: a smaller model that makes them; None: what is in RAM of `model` does.
    """

    def __init__(self, model: Model, small: DraftModel | None) -> None:
        self._model, self._small = model, small
        self._pace, self._followers = Pace(model.nodes), Followers()
        self._ahead: Guessed | None = None  # guesses for the next pass that were made during the last one

    @property
    def _guesses_pay(self) -> bool:
        return self._model.shares_reads or self._small is not None

    def works_for(self, lines: Sequence[Line]) -> bool:
        """Whether any of these texts has guesses."""
        return self._guesses_pay and any(line.drafts for line in lines)

    @property
    def works_ahead(self) -> bool:
        """Whether guesses may be made while a pass waits for the card."""
        return self._model.branches or self._small is not None

    def learn(self, trees: Trees, likely: Floats) -> None:
        """Keeps what a pass finds likely behind the nodes of its trees.

        `likely`: logits [R, n] of likely tokens, the rows behind the nodes first.
        """
        self._followers.learn(trees.tokens, likely[: len(trees.tokens), :LIKELY])

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        waited = self._ahead.waited if self._ahead else 0.0
        self._pace.measured_pass(seconds - waited, tokens)

    def read(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens, most of them of prompts, took so long."""
        self._pace.measured_prompt(seconds, tokens)

    def drawn(self, line: Line, trees: Trees, node: int, token: int) -> int | None:
        """The child of `node` that is `token`, which was drawn behind it; None if nobody guessed it.

        How far guesses are trusted follows from it.
        """
        child = trees.child(node, token)
        recycled = child is not None and trees.ranks[child] is not None
        if promised := trees.promised(node):
            self._pace.measured_guesses(child is not None and not recycled, promised)
        if child is None or recycled:
            self._followers.measured(trees.recycled(node), token)
        if line.looked_up:
            self._pace.measured_lookup(line.looked_up[0] == token)
            line.looked_up = line.looked_up[1:] if line.looked_up[0] == token else []
        return child

    def trees(self, speaking: Sequence[Line], most: int, on_step: OnStep) -> Trees:
        """The trees that the next pass checks, up to `most` nodes: each text's last token and guesses behind it."""
        started = time.perf_counter()
        guessed, self._ahead = self._ahead, None
        if guessed is None or guessed.texts != [line.tokens for line in speaking]:
            guessed = self._guesses([line.end for line in speaking], most, on_step)
        count = self._pace.count(guessed.draft, len(speaking), most, guessed.steps, guessed.ahead)
        trees = guessed.draft.trees(count)
        for text, line in enumerate(speaking):
            line.looked_up = guessed.looked_up[text]
            line.figures.drafted += trees.guesses(text)
            if guessed.steps and not trees.promised(trees.root(text)):
                self._pace.measured_guesses(False, 0.0)  # they were made, and are not worth a place in the pass
            line.figures.draft_seconds += time.perf_counter() - started
        return trees

    def _guesses(self, ends: Sequence[End], most: int, on_step: OnStep = silent, ahead: bool = False) -> Guessed:
        """Guesses at what follows each of some texts, up to `most` nodes in all. `ahead`: during a pass."""
        rooms = [end.room if self._guesses_pay else 0 for end in ends]
        draft = Draft([end.tokens[-1] for end in ends], rooms, self._pace.trust, self._model.branches)
        looked_up = [lookup(end.tokens, min(room, most - len(ends))) for end, room in zip(ends, rooms, strict=True)]
        for text, found in enumerate(looked_up):
            draft.follow(text, found, self._pace.looked_up)
        steps = 0
        if self._small:
            steps = self._draft_by(self._small, draft, ends, on_step, ahead)
        # if there may be no trees, what was looked up is not mixed with other guesses
        elif self._model.drafts and (self._model.branches or not any(looked_up)):
            steps = self._draft_from_ram(draft, ends, most, ahead)
        if self._model.branches:
            draft.recycle(self._followers, most)
        return Guessed([list(end.tokens) for end in ends], draft, looked_up, steps, ahead)

    @contextmanager
    def ahead(self, foresight: Foresight, likely: Floats) -> Iterator[None]:
        """Makes guesses for the next pass while the block waits for the card.

        They are for the texts as they will be if this pass draws tokens of the first n. likely: logits [T, n].
        """
        ends = [foreseen.end for foreseen in foresight.of(likely)]
        known = [end for end in ends if end]
        most = min(self._model.nodes, self._model.cache.context - self._model.cache.length)
        if len(known) < len(ends) or most <= len(ends):
            yield
            return
        started = time.perf_counter()
        with Background(lambda: (self._guesses(known, most, ahead=True), time.perf_counter())) as drafting:
            yield
        guessed, ended = drafting.result
        self._ahead = replace(guessed, waited=drafting.waited)
        if guessed.steps:
            self._pace.measured_ahead(ended - started, drafting.waited)

    def _draft_by(
        self, small: DraftModel, draft: Draft, ends: Sequence[End], on_step: OnStep, ahead: bool
    ) -> int:  # fmt: skip
        """Adds guesses of a small model to a draft, as long as that pays, and returns how many steps that took.

        It first reads what it has not read yet.
        """
        steps, most = 0, NODES if self._model.branches else 1
        while (nodes := draft.likeliest(1)) and self._pace.goes_on(draft, steps, nodes, ahead):
            text, guesses = draft.path(nodes[0])
            tokens, line, started = [*ends[text].tokens, *guesses], ends[text].line, time.perf_counter()
            unread = small.unread(tokens, line)
            draft.grow(nodes, small.guesses(tokens, line, most, lambda: on_step(0, 1, self._model.card.bytes_read)))
            if unread <= NODES:  # a whole prompt takes longer to read than a step does
                self._pace.measured_draft(time.perf_counter() - started)
            steps += 1
        return steps

    def _draft_from_ram(self, draft: Draft, ends: Sequence[End], most: int, ahead: bool) -> int:
        """Adds guesses of the model's `draft` to a draft, as long as that pays. Returns how many steps that took.

        The cache is left as it was.
        """
        steps, place, at_once = 0, self._model.cache.place, max(BEAM, len(ends))
        texts, numbers = [end.slots for end in ends], [end.line.number for end in ends]
        while (nodes := draft.likeliest(min(at_once, most))) and self._pace.goes_on(draft, steps, nodes, ahead):
            started = time.perf_counter()
            tokens, parents = draft.asked(nodes)
            draft.grow(nodes, self._model.draft(np.array(tokens, np.int64), Branches(texts, parents, numbers)))
            self._pace.measured_draft(time.perf_counter() - started)
            steps, most = steps + 1, most - len(nodes)
        self._model.cache.go_back(place)
        return steps
