"""How fast a bundle will answer on this machine, told without loading it.

What stays in RAM is multiplied once for each token, at a rate that is measured on a part of it. What does not is read
from the card once for each pass, at the rate that `flashd doctor` has measured. Drafts, which give several tokens a
pass, and a long text, which has more attention, are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.engine.forward import products
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.paging.card_speed import remembered
from flashd.engine.planning.parts import held
from flashd.engine.planning.plan import LEADING_FFNS, WEIGHTS, Plan
from flashd.graphs.constant import Arithmetic
from flashd.system.memory import MIB

PART = 48 * MIB
"""Bytes that are multiplied to measure the rate: more than the caches of a small processor hold."""

ROUNDS = 5

MULTIPLIED = (WEIGHTS, LEADING_FFNS, "attention", "head", "pinned neurons")
"""Parts of a plan that every token is multiplied with."""


def tokens_per_second(bundle: Bundle, plan: Plan) -> float | None:
    """The rate to expect with a plan. None if the card's speed is needed and was not measured.

    Raises DamagedRun, CardError.
    """
    reading = 0.0
    if plan.card_bytes:
        speed = remembered(bundle.path)
        if speed is None:
            return None
        reading = plan.card_bytes / speed.bandwidth
    in_ram = sum(plan.parts.get(part, 0) for part in MULTIPLIED)
    # the one goes on while the other does
    return 1 / max(reading, in_ram / _multiplied_per_second(bundle, plan))


def _multiplied_per_second(bundle: Bundle, plan: Plan) -> float:
    """Bytes of constant weights that are multiplied with one token in a second: the best of some rounds."""
    products.use_threads(plan.threads)
    arithmetic: Arithmetic = "int8" if plan.resident and plan.int8_layers else "float32"
    header = bundle.header
    x = np.ones((1, header.model.hidden), np.float32)
    (qkv, _) = header.model.mixing(header.model.attending[0])
    each = held(header.product_format(qkv), qkv.rows, arithmetic)
    sessions = list(_sessions(bundle, arithmetic, max(1, PART // each)))
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for session in sessions:
            multiplied(session, doubled=arithmetic == "float32", x=x)
        best = min(best, time.perf_counter() - started)
    return len(sessions) * each / best


def _sessions(bundle: Bundle, arithmetic: Arithmetic, most: int) -> Iterator[Any]:
    """The first products of up to so many layers that attend alike."""
    header = bundle.header
    constants, kind = Constants(header, arithmetic), header.formats.attention
    kinds = header.model.layer_kinds
    alike = [i for i in header.model.attending if kinds[i] == kinds[header.model.attending[0]]]
    for i in alike[:most]:
        yield constants.rows(bundle.rows(f"layer.{i}.qkv"), kind, header.model.hidden)
