"""The search over a mixture's layers: in which of them experts may have fewer bits within a loss of perplexity.

An expert sees few tokens of a text, too few to tell which of its groups matter. So all experts of a layer have as
many bits. Layers are sorted by how much fewer bits change what their experts say, and some shares of them are tried
on whole models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Narrowed
from flashd.bundle.rows.kinds import NARROW, Bytes, RowKind
from flashd.pack.lossy import narrow_groups
from flashd.pack.lossy.calibration import Calibration, Dense, Seen
from flashd.pack.lossy.narrow_groups import Judgement, Narrowing, Starts, Weigh
from flashd.pack.lossy.narrow_search import as_floats, dense, records
from flashd.pack.original import Original
from flashd.pack.weights.matrix import Numbers

log = logging.getLogger(__name__)

SAMPLED = 8
"""Experts of a layer that are rounded to learn how much fewer bits change."""


@dataclass(frozen=True)
class Shares:
    """The parts of the layers whose experts have fewer bits: those that bear it best."""

    int3: float
    int2: float


SHARES = (Shares(0, 1), Shares(0.5, 0.5), Shares(0.75, 0.25), Shares(1, 0), Shares(0.5, 0), Shares(0.25, 0))
"""What is tried. The first gives the fewest bytes."""


@dataclass(frozen=True)
class ExpertsLayer:
    """What decides how a layer's experts are ordered and rounded."""

    order: Numbers  # [E], experts that most tokens use come first
    weigh: list[Weigh]  # of each expert
    errors: dict[RowKind, float]  # of NARROW: how much fewer bits change, in parts of the hidden states' squares


@dataclass(frozen=True)
class FewExpertBits:
    """The layers, and what narrowing their experts costs."""

    layers: list[ExpertsLayer]
    starts: list[Starts | None]  # of each layer's narrow groups, which are all or none
    narrowed: Narrowed | None  # None if no layer is narrowed


def choose(original: Original, tokenizer_json: bytes, narrowing: Narrowing) -> FewExpertBits:
    """The layers of which experts have as few bits as the allowed loss admits, and what that costs.

    Raises DataError for too short a text.
    """
    model = original.model
    fit, judged = narrow_groups.cut(tokenizer_json, narrowing.text, model.context)
    calibration = original.calibration(fit)
    layers = [_seen(original, i, calibration) for i in range(model.layers)]
    tried = [kinds_of(model, layers, shares) for shares in SHARES]
    exact, tries = original.calibration(judged), [original.calibration(judged) for _ in tried]
    for i, layer in enumerate(layers):
        exact.mixture(i)
        of_kind = _experts_of_kinds(original, i, layer)
        for each, kinds in zip(tries, tried, strict=True):
            each.mixture(i, others=of_kind[kinds[i]] if kinds[i] in NARROW else None)
    found = narrow_groups.judge(exact, tries)
    _tell(tried, len(model.paged_layers), found)
    narrow = [not set(NARROW).isdisjoint(kinds) for kinds in tried]
    admitted = narrow_groups.admitted(original.path, narrow, found, narrowing.max_loss)
    if admitted is None:
        return FewExpertBits(layers, [None] * model.layers, None)
    starts = [
        Starts(0 if kind in NARROW else model.groups, 0 if kind == "int2" else model.groups)
        for kind in tried[admitted]
    ]
    return FewExpertBits(layers, [*starts], narrow_groups.narrowed(starts, judged, found[admitted]))


def kinds_of(model: Architecture, layers: Sequence[ExpertsLayer], shares: Shares) -> list[RowKind]:
    """The kind of rows of each layer's experts. Layers that have none are said to have int4."""
    kinds: list[RowKind] = ["int4"] * model.layers
    left = list(model.paged_layers)
    wanted: list[tuple[RowKind, float]] = [("int2", shares.int2), ("int3", shares.int3)]
    for kind, share in wanted:
        bear_it = sorted(left, key=lambda i: layers[i].errors[kind])[: round(share * len(model.paged_layers))]
        for i in bear_it:
            kinds[i] = kind
            left.remove(i)
    return kinds


def _tell(tried: Sequence[Sequence[RowKind]], layers: int, found: Sequence[Judgement]) -> None:
    """Logs what each try came to. `layers`: those that have experts."""
    for kinds, f in zip(tried, found, strict=True):
        log.info(
            "layers with experts of 3 and 2 bits: %d, %d of %d; perplexity %+.2f %%, KL %.4f",
            kinds.count("int3"), kinds.count("int2"), layers, 100 * f.loss, f.divergence,
        )  # fmt: skip


def _seen(original: Original, i: int, calibration: Calibration) -> ExpertsLayer:
    """Takes the texts through layer `i`, and rounds some of its experts."""
    model, ffns = original.model, original.weights.ffns(i)
    alike = Weigh(np.ones(model.hidden, np.float32), np.ones(model.expert_neurons, np.float32))
    weigh, errors, counted = [alike] * len(ffns), dict.fromkeys(NARROW, 0.0), list[int]()

    def sees(expert: int, tokens: Numbers, seen: Seen) -> None:
        weigh[expert] = Weigh.apart(seen)
        if len(counted) == SAMPLED:
            return
        counted.append(len(tokens))
        own, h = dense(ffns[expert], _neurons(original)), seen.h
        y = calibration.activate(own, h) @ own.down.T
        for kind in NARROW:
            raw = records(original, ffns[expert], kind, _neurons(original), weigh[expert])
            other = as_floats(original, kind, raw)
            errors[kind] += float(np.square(calibration.activate(other, h) @ other.down.T - y).sum())

    states = calibration.states
    order = calibration.mixture(i, sees=sees)
    size = float(np.square(states).mean()) * model.hidden * max(1, sum(counted))
    return ExpertsLayer(order, weigh, {kind: error / size for kind, error in errors.items()})


def _experts_of_kinds(original: Original, i: int, layer: ExpertsLayer) -> dict[RowKind, Callable[[int], Dense]]:
    """For each narrow kind what gives an expert of layer `i` in rows of this kind. Each is rounded once."""
    ffns = original.weights.ffns(i)

    @cache
    def written(kind: RowKind, expert: int) -> Bytes:
        return records(original, ffns[expert], kind, _neurons(original), layer.weigh[expert])

    def expert_of(kind: RowKind, expert: int) -> Dense:
        return as_floats(original, kind, written(kind, expert))

    return {kind: partial(expert_of, kind) for kind in NARROW}


def _neurons(original: Original) -> Numbers:
    """[F]: an expert's neurons, which stay in their order."""
    return np.arange(original.model.expert_neurons)
