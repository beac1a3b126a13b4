"""Measures what this machine does with a bundle's rows in a second, so that a plan can say how fast it will answer.

It takes a second or two, and is remembered for the machine, see planning.rates.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np

from flashd.bundle.arrays import Groups
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import GroupFormat
from flashd.engine.forward import products
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.kept import Kept, Shelf
from flashd.engine.forward.unpacked import Entering, Multiplier
from flashd.engine.model.sizes import at_work
from flashd.engine.planning.parts import group_held
from flashd.engine.planning.plan import Plan
from flashd.engine.planning.rates import CHECKING, GUESSING, Rates, remember_rates, remembered_rates
from flashd.engine.planning.unpacked import GUESSED
from flashd.errors import CannotWrite
from flashd.graphs.constant import Arithmetic
from flashd.system.memory import MIB

log = logging.getLogger(__name__)

MOST, LEAST = 128 * MIB, 8 * MIB
"""Bytes that are multiplied to measure a rate: more than the caches of a processor hold, if the budget allows it."""

ROUNDS = 5


def measure(bundle: Bundle, plan: Plan) -> None:
    """Measures and remembers what `remembered_rates` tells, if it is not known. Raises DamagedRun, CardError.

    It takes up to a quarter of the plan's memory.
    """
    if bundle.header.selection or remembered_rates(bundle.header, plan) is not None:
        return  # neurons that are selected are multiplied one by one, and the card is what they wait for
    rates = _measured(bundle, plan)
    try:
        remember_rates(bundle.header, plan, rates)
    except CannotWrite as error:
        log.warning("what was measured is not kept: %s", error)


def _measured(bundle: Bundle, plan: Plan) -> Rates:
    products.use_threads(plan.threads, shared=plan.all_constant)
    largest = group_held(bundle.header.largest_group, plan.of_ffns)
    groups, forms = zip(*_groups(bundle, max(2, min(MOST, max(plan.memory // 4, LEAST)) // largest)), strict=True)
    unpacked = _Unpacked(bundle, plan, groups, forms)
    if plan.resident or bundle.header.model.experts:
        held = sum(group_held(form, plan.of_ffns) for form in forms)
        wide = [form.wide(some) for form, some in zip(forms, groups, strict=True)]
        exact = guess = _opened(bundle, plan.of_ffns, wide)
    else:
        held = sum(form.nbytes for form in forms)
        exact, guess = unpacked.multiplied(plan.arithmetic), unpacked.multiplied(GUESSED)
    once, checked = (held / _best(partial(exact, tokens)) for tokens in (1, CHECKING))
    streamed = sum(form.nbytes for form in forms) / _best(unpacked.streamed)
    guessed = held / _best(partial(guess, GUESSING))
    return Rates(streamed=streamed, multiplied=once, guessed=guessed, checked=checked)


def _groups(bundle: Bundle, most: int) -> Iterator[tuple[Groups, GroupFormat]]:
    """The first groups of all layers, one by one, up to `most`, and their formats as they are multiplied."""
    every = bundle.header.model.layer_groups
    left = most
    for layer in bundle.header.model.paged_layers:
        for _, groups in bundle.groups(layer, min(left, every[layer]), at_once=1):
            yield groups, bundle.header.group_of(layer)
            left -= 1
        if not left:
            return


def _opened(bundle: Bundle, arithmetic: Arithmetic, groups: Sequence[Groups]) -> Callable[[int], None]:
    """Multiplies so many tokens with groups, the constants of a session each."""
    m, constants = bundle.header.model, Constants(bundle.header, arithmetic)
    sessions = [constants.groups(some) for some in groups]

    def run(tokens: int) -> None:
        h, before = (np.ones((tokens, width), np.float32) for width in (m.group_input_width, m.share_width))
        for session in sessions:
            multiplied(session, arithmetic == "float32", h=h, before=before)

    return run


class _Unpacked:
    """Multiplies groups as the card has them, in as many threads as a pass does."""

    def __init__(self, bundle: Bundle, plan: Plan, groups: Sequence[Groups], forms: Sequence[GroupFormat]) -> None:
        self._header, self._arithmetic, self._threads = bundle.header, plan.arithmetic, at_work(plan.threads)
        self._shelf, self._multiply = Shelf(), Multiplier(bundle.header, plan.arithmetic)
        self._groups, self._forms = groups, forms

    def streamed(self) -> None:
        """A token with groups that have just come. Experts are copied, and narrowed groups widened."""
        if not (self._header.model.experts or self._header.narrowed):
            self.multiplied(self._arithmetic)(1)
            return
        entering = self._entering(self._multiply, 1)
        self._run(lambda form, some: self._multiply(self._shelf.keep(form, some), entering[form]), self._groups)

    def multiplied(self, arithmetic: Arithmetic) -> Callable[[int], None]:
        """So many tokens with groups that are in RAM."""
        multiply = self._multiply if arithmetic == self._arithmetic else Multiplier(self._header, arithmetic)

        def run(tokens: int) -> None:
            entering = self._entering(multiply, tokens)
            self._run(lambda form, group: multiply(group, entering[form]), self._kept)

        return run

    @cached_property
    def _kept(self) -> list[Kept]:
        return list(map(self._shelf.keep, self._forms, self._groups))

    def _entering(self, multiply: Multiplier, tokens: int) -> dict[GroupFormat, Entering]:
        h = np.ones((tokens, self._header.model.group_input_width), np.float32)
        return {form: multiply.entering(form.row, h) for form in set(self._forms)}

    def _run(self, one: Callable[[GroupFormat, Any], object], groups: Sequence[Any]) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            deque(pool.map(one, self._forms, groups), maxlen=0)


def _best(measured: Callable[[], object]) -> float:
    """Seconds of the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        measured()
        best = min(best, time.perf_counter() - started)
    return best
