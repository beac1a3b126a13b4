"""How many guesses to make and to check: as many as make the most tokens a second, by what they cost before."""

from __future__ import annotations

from collections.abc import Sequence

from flashd.engine.decoding.drafting.drafts import Draft
from flashd.engine.decoding.drafting.followers import STEP
from flashd.engine.model.sizes import NODES

STEPS = 4
"""Steps of drafting for a pass, until their cost has been measured."""

MEAN_DECAY = 0.9
"""The part of a running mean that stays when something new is measured."""

LEAST_SPREAD, FEW = 0.3, 2
"""Of the tokens of passes: the least variance that says what a token costs. If it is less, a pass has half of them
now and then, or some more if there are few."""

MANY = 32
"""Tokens of a prompt that tell well what a token costs."""

LEAST_TRUST = 0.1
"""The least trust in guesses from RAM."""

PROBE = 16
"""After so many passes without guesses from RAM they are tried again: the text may have become easier."""


class _Cost:
    """The seconds of a pass: some in any case, and some for each of its tokens. A line through running means.

    As long as passes have not told what a token costs, the last pass over a prompt does.
    """

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0
        self._slope: float | None = None
        self._prompt: tuple[int, float] | None = None

    def __bool__(self) -> bool:
        """Whether something has been measured."""
        return self._weight > 0

    def add(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        old, new = (MEAN_DECAY, 1 - MEAN_DECAY) if self else (0.0, 1.0)
        self._weight = old * self._weight + new
        self._tokens, self._seconds = old * self._tokens + new * tokens, old * self._seconds + new * seconds
        self._squares = old * self._squares + new * tokens**2
        self._products = old * self._products + new * tokens * seconds
        if self.tells:
            self._slope = max(0.0, (self._products - self._tokens * self._seconds) / self._spread)

    def add_prompt(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens of a prompt took so long. Few of them tell less than more did before."""
        if self._prompt is None or tokens >= min(self._prompt[0], MANY):
            self._prompt = tokens, seconds

    @property
    def tells(self) -> bool:
        """Whether the passes differed enough to say what a token costs."""
        return self._spread >= LEAST_SPREAD

    @property
    def _spread(self) -> float:
        return self._squares - self._tokens**2

    @property
    def _each(self) -> float:
        """Seconds that a token more takes."""
        if self._slope is not None:
            return self._slope
        tokens, seconds = self._prompt or (0, 0.0)
        more = tokens - self._tokens
        return max(0.0, (seconds - self._seconds) / more) if more >= FEW else 0.0

    def of(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens. Not 0."""
        return max(self._seconds + self._each * (tokens - self._tokens), self._each * tokens, 1e-9)


class Pace:
    """Running means: the seconds that a step of drafting and a pass take, and how often guesses are right.

    The first values stand until something has been measured.

    `most`: the most nodes of a pass.
    """

    def __init__(self, most: int = NODES) -> None:
        self.most = most
        self.trust = 0.7
        """What the odds of guesses from RAM are multiplied by."""
        self.found = 0.7
        """How often what is drawn is among them. It seldom is if all odds are small, however far they are trusted."""
        self.looked_up = 0.5
        """How often a token that was looked up is right."""
        self._draft: float | None = None
        self._free = 0.0
        self._pass = _Cost()
        self._idle = self._counted = 0

    def goes_on(self, draft: Draft, steps: int, nodes: Sequence[int], ahead: bool) -> bool:
        """Whether a further step, of guesses behind `nodes`, makes more tokens a second. `steps` were made before.

        `ahead`: they are made during a pass.
        """
        if self._draft is None or not self._pass:
            return steps < STEPS
        count, rate = self._best(draft, 1, min(self.most, len(draft)), self._drafting(steps, ahead))
        # as many of the least likely nodes as come anew give way to these
        kept = min(count, self.most - len(nodes))
        seconds = self._pass.of(kept + len(nodes)) + self._drafting(steps + 1, ahead)
        pays = (draft.expected(kept) + self.found * draft.odds(nodes)) / seconds > rate
        if not pays and steps == 0:
            self._idle += 1
            return self._idle % PROBE == 0
        return pays

    def count(self, draft: Draft, least: int, most: int, steps: int, ahead: bool) -> int:
        """How many nodes the next pass checks. `least` are the texts' last tokens; the draft took `steps`."""
        self._counted += 1
        most = min(most, len(draft))
        if most <= least:
            return most
        if not self._pass:
            return min(most, least + STEPS)
        count = self._best(draft, least, most, self._drafting(steps, ahead))[0]
        if not self._pass.tells and self._counted % PROBE == 0:  # to see what a node costs
            return max(least, count // 2) if count >= least + FEW else min(most, count + FEW)
        return count

    def _drafting(self, steps: int, ahead: bool) -> float:
        """Seconds that so many steps add to a pass."""
        return max(0.0, steps * (self._draft or 0.0) - (self._free if ahead else 0.0))

    def _best(self, draft: Draft, least: int, most: int, drafting: float) -> tuple[int, float]:
        """(how many nodes make the most tokens a second, how many these are)."""
        rates = {n: draft.expected(n) / (self._pass.of(n) + drafting) for n in range(least, most + 1)}
        best = max(rates, key=lambda n: rates[n])
        return best, rates[best]

    def measured_draft(self, seconds: float) -> None:
        """A step of drafting took `seconds`."""
        self._draft = _mean(self._draft, seconds)

    def measured_ahead(self, drafting: float, waited: float) -> None:
        """During a pass guesses were made for `drafting` seconds. It then waited so long for them.

        What it did not wait for took nothing. If it did not wait at all, there may have been time for more.
        """
        free = drafting - waited
        self._free = _mean(self._free, free) if waited > 0 else max(self._free, free)

    def measured_pass(self, seconds: float, tokens: int) -> None:
        """A pass that checked so many tokens took `seconds`, without what it waited for guesses."""
        self._pass.add(tokens, seconds)

    def measured_prompt(self, seconds: float, tokens: int) -> None:
        """A pass over so many tokens of prompts took `seconds`."""
        self._pass.add_prompt(tokens, seconds)

    def measured_guesses(self, right: bool, promised: float) -> None:
        """Says whether the token drawn was among the guesses. `promised` was its probability by their odds."""
        self.trust = min(max(self.trust + STEP * (right - promised), LEAST_TRUST), 1.0)
        self.found = _mean(self.found, right)

    def measured_lookup(self, right: bool) -> None:
        """Says whether the token drawn was the one that was looked up."""
        self.looked_up = _mean(self.looked_up, right)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEAN_DECAY * old + (1 - MEAN_DECAY) * new
