"""The thresholds of one layer whose gate rows stay in RAM and say which neurons a token needs.

gate_search.py tries these thresholds on whole models and decides.

If the activation has zeros, skipping these neurons is exact. If not, a neuron is skipped if its gate's activation is
small (CATS, arXiv 2404.08763), or small in relation to the neuron's weight in the output. Neurons that RAM holds
anyway may be preferred, so that more of the others are skipped, as in DIP's cache-aware masking (arXiv 2412.01380).
Here the hottest neurons are preferred and not those used last, so that a text does not depend on what was asked
before it. How much each layer skips is shared out so that the outputs err least in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.pack.lossy.calibration import Mask, Numbers, Seen
from flashd.pack.lossy.card_order import card_order
from flashd.pack.lossy.predictors import Cost, cost, spans

STEPS = 10
"""S, the thresholds of a layer. Threshold s skips s tenths of the neurons whose gate's activation is not zero."""

LEVELS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
"""Shares of the neurons of all layers that are tried: the largest that keeps to the loss is taken."""

TOKENS = 256
"""Tokens of all texts on which outputs are compared and reads are counted."""

SPREAD = 1024
"""Tokens of all texts on which thresholds are found."""

LEAST = np.float32(1e-2)
"""The least weight of a neuron, in parts of the mean: another text may use what this one did not."""


@dataclass(frozen=True)
class Gating:
    """What the user allows gates to cost."""

    max_loss: float  # the most by which perplexity may rise: 0.01 is one per cent
    text: str | None = None  # text like that which the model will meet; None: text that ships with flashd


@dataclass
class GatedLayer:
    """A layer's thresholds, and which of them is chosen. Neurons are numbered as in the source."""

    weigh: Floats  # [F], the size of each gate's activation is multiplied by this
    preferred: Mask  # [F], neurons that are never skipped unless their activation is zero
    thresholds: Floats  # [S], the product must be above the one chosen
    errors: Floats  # [S], mean square of what the output then lacks, in parts of the hidden state's
    rates: Floats  # [S, F], how often each neuron then takes part
    path: Numbers | None  # [F], the order of the card; None: those that take part most often first
    fired: float  # the share of activations that are not zero
    step: int = 0  # the number of the threshold that is chosen

    @property
    def threshold(self) -> float:
        return float(self.thresholds[self.step])

    @property
    def floors(self) -> Floats:
        """[F]: the size of each gate's activation must be above this."""
        return np.where(self.preferred, np.float32(0), self.threshold / self.weigh)

    @property
    def often(self) -> Floats:
        """[F]: how often each neuron takes part."""
        return np.asarray(self.rates[self.step])

    @property
    def order(self) -> Numbers:
        """[F]: the neurons as they lie on the card."""
        return np.argsort(-self.often, kind="stable") if self.path is None else self.path

    def chosen(self, gates: Floats) -> Mask:
        """[N, F]: which neurons take part, by the activations of their gates [N, F]."""
        return np.asarray(np.abs(gates) > self.floors)

    def missed(self, chosen: Mask) -> Mask:
        """[N, F]: the neurons that take part and are not in the hotter half, in the order of the card."""
        cold = np.argsort(-self.often, kind="stable")[len(self.often) // 2 :]
        out = np.zeros_like(chosen)
        out[:, cold] = chosen[:, cold]
        return out[:, self.order]


def fit(gates: Floats, seen: Seen, down: Floats, states: Floats, exact: bool) -> tuple[GatedLayer, ...]:
    """A layer's thresholds, from what it computed in N tokens: with no neuron preferred, and with the hotter half.

    Args:
        gates: the activations of its gates, [N, F].
        seen: what its FFN computed.
        down: its down_proj, [H, F].
        states: the hidden states behind it, [N, H].
        exact: skip only zeros. Then no neuron needs to be preferred, and there is one result.
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
    """A layer's thresholds, with some neurons preferred.

    Args:
        size: the sizes of its gates' activations, [N, F].
        weighs: what these may be multiplied by, each [F]: the best is taken.
        a: the neurons' activations, [N, F].
        down: its down_proj, [H, F].
        states: the hidden states behind it, [N, H].
        preferred: [F].
    """
    some = np.linspace(0, len(size) - 1, min(TOKENS, len(size))).astype(np.int64)  # [n] of the N tokens
    sizes = np.square(states[some]).sum(1)  # [n]
    tried = []
    for weigh in weighs:
        found = _thresholds(size, weigh, preferred)
        middle = _error(_above(size[some] * weigh, preferred, found[STEPS // 2]), a[some], down, sizes)
        tried.append((middle, weigh, found))
    _, weigh, found = min(tried, key=lambda each: each[0])
    scores = size * weigh  # [N, F]
    errors = [_error(_above(scores[some], preferred, t), a[some], down, sizes) for t in found]
    rates = np.stack([_above(scores, preferred, t).mean(0, dtype=np.float32) for t in found])
    return GatedLayer(weigh, preferred, found, np.array(errors, np.float32), rates, None, float((size > 0).mean()))


def _weighs(size: Floats, seen: Seen) -> Floats:
    """[F]: the size of a neuron's contribution to the output, in relation to its gate's activation [N, F]."""
    up = np.sqrt(np.square(seen.a).mean(0) / np.maximum(np.square(size).mean(0), np.float32(1e-20)))  # [F]
    weigh = up * seen.reach
    weigh = np.maximum(weigh / max(float(weigh.mean()), 1e-20), LEAST)
    return np.asarray(weigh, np.float32)


def _thresholds(size: Floats, weigh: Floats, preferred: Mask) -> Floats:
    """[S]: the thresholds that skip 0, 1, 2, ... tenths of the neurons that fire and are not preferred."""
    scores = size[:: max(1, len(size) // SPREAD), ~preferred] * weigh[~preferred]  # [n, not preferred]
    found = np.quantile(scores[scores > 0], np.arange(STEPS) / STEPS)
    found[0] = 0
    return np.asarray(found, np.float32)


def _above(scores: Floats, preferred: Mask, threshold: np.floating[Any]) -> Mask:
    """[N, F]: which neurons take part, by scores [N, F]."""
    return np.asarray(scores > np.where(preferred, np.float32(0), threshold))


def _error(chosen: Mask, a: Floats, down: Floats, sizes: Floats) -> float:
    """The mean square of what the output lacks without the neurons not chosen, in parts of the states' sizes [N]."""
    lacks = np.where(chosen, np.float32(0), a) @ down.T  # [N, H]
    return float((np.square(lacks).sum(1) / sizes).mean())


def share_out(layers: Sequence[GatedLayer], level: float) -> None:
    """Chooses the layers' thresholds so that they skip the share `level` of the neurons that fire.

    One tenth after the other is skipped in the layer where it costs the least error for each byte.
    """
    if len(layers[0].errors) == 1:
        return
    fired = np.array([layer.fired for layer in layers])
    # each further tenth of a layer costs more than the one before, apart from noise
    rises = np.maximum.accumulate(np.diff(np.stack([layer.errors for layer in layers]), axis=1), axis=1)  # [L, S - 1]
    cheapest = np.argsort((rises / fired[:, None]).reshape(-1), kind="stable") // rises.shape[1]
    skipped = np.cumsum(fired[cheapest]) / STEPS
    taken = cheapest[: int(np.searchsorted(skipped, level * fired.sum(), side="right"))]
    for layer, step in zip(layers, np.bincount(taken, minlength=len(layers)).tolist(), strict=True):
        layer.step = step


@dataclass
class Asked:
    """What tokens ask of the card if RAM has room for half of the neurons."""

    unit_bytes: int  # of a neuron
    units: list[float] = field(default_factory=list)  # of each layer: neurons a token
    reads: list[float] = field(default_factory=list)  # of each layer: reads a token

    def count(self, missed: Mask) -> None:
        """Counts one more layer, in which the tokens missed the neurons [N, F]."""
        units, reads = spans(missed[:TOKENS], self.unit_bytes)
        tokens = min(TOKENS, len(missed))
        self.units.append(units / tokens)
        self.reads.append(reads / tokens)

    @property
    def cost(self) -> Cost:
        return cost(sum(self.units) * self.unit_bytes, sum(self.reads))

    def of_all(self, neurons: int) -> Cost:
        """The cost if all neurons take part. Each layer has `neurons`."""
        return cost(len(self.units) * neurons / 2 * self.unit_bytes, len(self.units))
