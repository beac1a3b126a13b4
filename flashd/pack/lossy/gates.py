"""The gate as the decision: gate rows stay in RAM and say which neurons a token needs.

Where the activation has zeros that is exact, and nothing is lost. Elsewhere a neuron is skipped whose gate's
activation is small (CATS, arXiv 2404.08763), or small for what the neuron weighs. Or what RAM has anyway is
preferred, and more of the rest is skipped (DIP's cache-aware masking, arXiv 2412.01380): here that is what is
hottest and not what was used last, so that a text does not depend on what was asked before it. How many are skipped
is shared out to the layers so that in all the outputs err least, and what that costs is measured on text that
nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashd.bundle.formats import GroupFormat
from flashd.bundle.row_kinds import BLOCK, Bytes, Floats
from flashd.pack.lossy.calibration import Mask, Numbers, Seen
from flashd.pack.lossy.card_order import card_order
from flashd.pack.lossy.predictors import Cost, cost, spans

STEPS = 10
"""A layer skips so many tenths of its neurons whose gate's activation is not zero."""

LEVELS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
"""Shares of those of all layers that may be skipped: the largest that keeps to the loss is taken."""

TOKENS = 256
"""Of all texts, on which outputs are compared and reads counted."""

SPREAD = 1024
"""And on which thresholds are found."""

LEAST = np.float32(1e-2)
"""What a neuron weighs at least, in parts of the mean: what a text did not use another may."""


@dataclass(frozen=True)
class Gating:
    """What the user allows."""

    max_loss: float  # of perplexity, in parts of it
    text: str | None = None  # like that which the model will meet; None: what ships with flashd


@dataclass
class GatedLayer:
    """A layer's thresholds, by how many tenths of its neurons they skip. Neurons are numbered as in the source."""

    weigh: Floats  # [F], what the size of each gate's activation is multiplied by
    preferred: Mask  # [F], those that are never skipped unless their activation is zero
    thresholds: Floats  # [S], that it must exceed
    errors: Floats  # [S], mean square of what the output lacks, in parts of the hidden state's
    rates: Floats  # [S, F], how often each neuron takes part
    path: Numbers | None  # [F], the order of the card; None: those that take part most often first
    fired: float  # share of activations that are not zero
    step: int = 0  # what is chosen of the S

    @property
    def threshold(self) -> float:
        return float(self.thresholds[self.step])

    @property
    def floors(self) -> Floats:
        """[F]: what the size of each gate's activation must exceed."""
        return np.where(self.preferred, np.float32(0), self.threshold / self.weigh)

    @property
    def often(self) -> Floats:
        """[F]"""
        return np.asarray(self.rates[self.step])

    @property
    def order(self) -> Numbers:
        """[F]: the neurons as they lie on the card."""
        return np.argsort(-self.often, kind="stable") if self.path is None else self.path

    def chosen(self, gates: Floats) -> Mask:
        """[N, F]: which neurons take part, by the activations of their gates [N, F]."""
        return np.asarray(np.abs(gates) > self.floors)

    def missed(self, chosen: Mask) -> Mask:
        """Of what takes part, in the order of the card, what is not among the half that takes part most often."""
        cold = np.argsort(-self.often, kind="stable")[len(self.often) // 2 :]
        out = np.zeros_like(chosen)
        out[:, cold] = chosen[:, cold]
        return out[:, self.order]


def fit(gates: Floats, seen: Seen, down: Floats, states: Floats, exact: bool) -> tuple[GatedLayer, ...]:
    """A layer's thresholds, from what it did in N tokens: where none are preferred, and where the hotter half is.

    Args:
        gates: the activations of its gates, [N, F].
        down: [H, F].
        states: the hidden states behind the layer, [N, H].
        exact: zeros alone are skipped, and nothing need be preferred.
    """
    size = np.abs(gates)
    plain, none = np.ones(size.shape[1], np.float32), np.zeros(size.shape[1], np.bool_)
    if exact:
        fires = size > 0
        often = fires.mean(0, dtype=np.float32)
        nothing = np.zeros(1, np.float32)
        return (GatedLayer(plain, none, nothing, nothing, often[None], card_order(fires), float(often.mean())),)
    hotter = none.copy()
    hotter[np.argsort(-seen.sizes(), kind="stable")[: len(none) // 2]] = True
    weighs = plain, _weighs(size, seen)
    return tuple(_fit(size, weighs, seen.a, down, states, preferred) for preferred in (none, hotter))


def _fit(
    size: Floats, weighs: Sequence[Floats], a: Floats, down: Floats, states: Floats, preferred: Mask
) -> GatedLayer:
    """A layer's thresholds for the sizes [N, F] of its gates' activations where some neurons [F] are preferred.

    `weighs` [F] are tried, what the sizes may be multiplied by; `a` [N, F]: what the neurons give.
    """
    some = np.linspace(0, len(size) - 1, min(TOKENS, len(size))).astype(np.int64)
    sizes = np.square(states[some]).sum(1)
    tried = []
    for weigh in weighs:
        found = _thresholds(size, weigh, preferred)
        middle = _error(_above(size[some] * weigh, preferred, found[STEPS // 2]), a[some], down, sizes)
        tried.append((middle, weigh, found))
    _, weigh, found = min(tried, key=lambda each: each[0])
    scores = size * weigh
    errors = [_error(_above(scores[some], preferred, t), a[some], down, sizes) for t in found]
    rates = np.stack([_above(scores, preferred, t).mean(0, dtype=np.float32) for t in found])
    return GatedLayer(weigh, preferred, found, np.array(errors, np.float32), rates, None, float((size > 0).mean()))


def _weighs(size: Floats, seen: Seen) -> Floats:
    """[F]: how long a neuron's share in the output is beside its gate's activation."""
    up = np.sqrt(np.square(seen.a).mean(0) / np.maximum(np.square(size).mean(0), np.float32(1e-20)))
    weigh = up * seen.reach
    weigh = np.maximum(weigh / max(float(weigh.mean()), 1e-20), LEAST)
    return np.asarray(weigh, np.float32)


def _thresholds(size: Floats, weigh: Floats, preferred: Mask) -> Floats:
    """[S], of sizes [N, F] of those that are not preferred."""
    scores = size[:: max(1, len(size) // SPREAD), ~preferred] * weigh[~preferred]
    found = np.quantile(scores[scores > 0], np.arange(STEPS) / STEPS)
    found[0] = 0
    return np.asarray(found, np.float32)


def _above(scores: Floats, preferred: Mask, threshold: np.floating[Any]) -> Mask:
    """Which neurons take part, by scores [N, F]."""
    return np.asarray(scores > np.where(preferred, np.float32(0), threshold))


def _error(chosen: Mask, a: Floats, down: Floats, sizes: Floats) -> float:
    lacks = np.where(chosen, np.float32(0), a) @ down.T
    return float((np.square(lacks).sum(1) / sizes).mean())


def share_out(layers: Sequence[GatedLayer], level: float) -> None:
    """Has the layers skip `level` of what fires and is not preferred, where a tenth costs the least error a byte."""
    if len(layers[0].errors) == 1:
        return
    fired = np.array([layer.fired for layer in layers])
    # a threshold's next step costs more than the one before, but for noise
    rises = np.maximum.accumulate(np.diff(np.stack([layer.errors for layer in layers]), axis=1), axis=1)
    cheapest = np.argsort((rises / fired[:, None]).reshape(-1), kind="stable") // rises.shape[1]
    skipped = np.cumsum(fired[cheapest]) / STEPS
    taken = cheapest[: int(np.searchsorted(skipped, level * fired.sum(), side="right"))]
    for layer, step in zip(layers, np.bincount(taken, minlength=len(layers)).tolist(), strict=True):
        layer.step = step


@dataclass
class Asked:
    """What tokens ask of the card, whose neurons have so many bytes, where RAM has room for half of them."""

    unit_bytes: int
    units: list[float] = field(default_factory=list)  # of each layer, a token
    reads: list[float] = field(default_factory=list)

    def count(self, missed: Mask) -> None:
        """One more layer, of which the tokens missed neurons [N, F]."""
        units, reads = spans(missed[:TOKENS], self.unit_bytes)
        tokens = min(TOKENS, len(missed))
        self.units.append(units / tokens)
        self.reads.append(reads / tokens)

    @property
    def cost(self) -> Cost:
        return cost(sum(self.units) * self.unit_bytes, sum(self.reads))

    def of_all(self, neurons: int) -> Cost:
        """What it is where all neurons take part, `neurons` of each layer."""
        return cost(len(self.units) * neurons / 2 * self.unit_bytes, len(self.units))


def parted(raw: Bytes, form: GroupFormat) -> tuple[Bytes, Bytes, Bytes]:
    """Groups [n, nbytes] of gated neurons -> gate rows, what else is each neuron's [32 n, ...], what groups share."""
    body = raw[:, : BLOCK * form.bundle_bytes].reshape(-1, form.bundle_bytes)
    return body[:, : form.row.nbytes], body[:, form.row.nbytes :], raw[:, BLOCK * form.bundle_bytes :]
