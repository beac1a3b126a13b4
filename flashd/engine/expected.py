"""Measures what this machine does with a bundle's rows in a second, so that a plan can say how fast it will answer.

It takes a second or two, and is remembered for the machine, see planning.rates.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flashd.bundle.arrays import Groups
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import GroupFormat
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward import products
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.unpacked import Multiplier, Shelf
from flashd.engine.model.sizes import AT_WORK
from flashd.engine.paging.card_speed import IN_FLIGHT
from flashd.engine.planning.parts import BUFFERS, group_held
from flashd.engine.planning.plan import Plan
from flashd.engine.planning.rates import CHECKING, GUESSING, Rates, remember_rates, remembered_rates
from flashd.errors import CannotWrite
from flashd.graphs.constant import Arithmetic
from flashd.system.freed_memory import reuse_freed_memory, use_small_pages
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
    products.use_threads(plan.threads, shared=plan.resident)
    arithmetic = plan.of_ffns
    constants = Constants(bundle.header, arithmetic)
    largest = group_held(bundle.header.largest_group, arithmetic)
    groups, forms = zip(*_groups(bundle, max(2, min(MOST, max(plan.memory // 4, LEAST)) // largest)), strict=True)
    single, few, many = (_Input.of(bundle, arithmetic, tokens) for tokens in (1, GUESSING, CHECKING))
    if bundle.header.model.experts:
        opened = _unpacked(bundle, plan, groups, forms)
    else:
        opened = _opened(constants, groups, sum(form.nbytes for form in forms), many)
    sessions = [constants.groups(some) for some in groups]
    once, guessed, checked = (_best(partial(_all_of, sessions, given)) for given in (single, few, many))
    held = sum(group_held(form, arithmetic) for form in forms)
    return Rates(opened=opened, multiplied=held / once, guessed=held / guessed, checked=held / checked)


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


@dataclass(frozen=True)
class _Input:
    """What goes into the FFN of some tokens."""

    h: Floats  # [T, H]
    before: Floats  # [T, W]
    doubled: bool

    @classmethod
    def of(cls, bundle: Bundle, arithmetic: Arithmetic, tokens: int) -> _Input:
        m = bundle.header.model
        h, before = (np.ones((tokens, width), np.float32) for width in (m.hidden, m.share_width))
        return cls(h, before, arithmetic == "float32")

    def multiplied(self, session: Any) -> Floats:
        return multiplied(session, self.doubled, h=self.h, before=self.before)


def _all_of(sessions: Sequence[Any], given: _Input) -> None:
    for session in sessions:
        given.multiplied(session)


def _opened(constants: Constants, groups: Sequence[Groups], nbytes: int, given: _Input) -> float:
    """Bytes a second of groups of `nbytes`: threads that read open sessions, which are multiplied in this one."""

    def pass_by() -> None:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            coming = deque[Future[Any]]()
            for some in groups:
                coming.append(pool.submit(constants.groups, some, once=True))
                if len(coming) == BUFFERS:
                    given.multiplied(coming.popleft().result())
            for last in coming:
                given.multiplied(last.result())

    reuse_freed_memory()
    try:
        return nbytes / _best(pass_by)
    finally:
        use_small_pages()


def _unpacked(bundle: Bundle, plan: Plan, groups: Sequence[Groups], forms: Sequence[GroupFormat]) -> float:
    """Bytes a second of groups of experts, which are kept and multiplied with a token each."""
    m, shelf, multiplier = bundle.header.model, Shelf(), Multiplier(bundle.header, plan.arithmetic)
    entering = {form: multiplier.entering(form, np.ones((1, m.hidden), np.float32)) for form in set(forms)}
    before = np.zeros((1, m.hidden), np.float32)

    def one(form: GroupFormat, group: Groups) -> None:
        multiplier(shelf.keep(form, group), entering[form], before)

    with ThreadPoolExecutor(min(plan.threads, AT_WORK)) as pool:
        return sum(form.nbytes for form in forms) / _best(lambda: list(pool.map(one, forms, groups)))


def _best(measured: Callable[[], object]) -> float:
    """Seconds of the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        measured()
        best = min(best, time.perf_counter() - started)
    return best
