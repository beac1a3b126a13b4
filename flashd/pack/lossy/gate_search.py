"""The search over all layers: how many neurons gates may skip within a loss of perplexity, and whether that pays.

gates.py has the thresholds of one layer. This module tries levels on whole models, judges them and decides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashd.bundle.header import Selection, pair_format
from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.lossy.calibration import Calibration, Mask, Numbers
from flashd.pack.lossy.gates import LEVELS, Asked, GatedLayer, Gating, fit, share_out
from flashd.pack.lossy.narrow_groups import Judgement, cut, judge
from flashd.pack.lossy.predictors import SPARSE, WORTH
from flashd.pack.original import Original

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gated:
    """The layers with the thresholds that were chosen, and what these cost."""

    layers: Sequence[GatedLayer]
    selection: Selection


@dataclass(frozen=True)
class _Skipping:
    """What gates skip at a level, and what that costs."""

    level: float  # the share of neurons that fire and are skipped
    found: Judgement
    asked: Asked


def check(original: Original) -> None:
    """Raises DataError for a model whose gates cannot choose neurons."""
    model, path = original.model, original.path
    if model.layer_neurons:
        raise DataError(f"{path}: neurons of FFNs of several widths cannot be selected; pack it with --select exact")
    if model.bounds:
        raise DataError(f"{path}: gates that have a bound cannot choose; pack it without --select gate")
    if not model.gated or "inputs" in model.biases:
        raise DataError(f"{path}: {model.family} has no gate rows that could choose; pack it without --select gate")
    if model.experts or original.formats.ffn == "ternary" or model.normed_neurons:
        raise DataError(
            f"{path}: gates cannot choose in mixtures of experts or in BitNet; pack it without --select gate"
        )


def choose(original: Original, tokenizer_json: bytes, gating: Gating) -> Gated | None:
    """The layers whose gates skip as much as the allowed loss admits. None if that does not pay.

    It tries to prefer the hotter half of the neurons, and to prefer none, and takes what a card reads faster. Raises
    DataError for too short a text.
    """
    fitted, judged = cut(tokenizer_json, gating.text, original.model.context)
    calibration, exact = original.calibration(fitted), original.calibration(judged)
    numbers = range(original.model.layers)
    tries = list(zip(*(_fit(original, i, calibration) for i in numbers), strict=True))
    for i in numbers:
        exact.mixture(i)
    found = [(layers, _most(original, judged, exact, layers, gating.max_loss)) for layers in tries]
    admitted = [each for each in found if each[1].found.loss <= gating.max_loss]
    if not admitted:
        log.warning(
            "%s: gates that skip %.0f %% of neurons raise perplexity by %.2f %%, which is more than %.2f %%:"
            " packed exact", original.path, 100 * max(s.level for _, s in found),
            100 * min(s.found.loss for _, s in found), 100 * gating.max_loss,
        )  # fmt: skip
        return None
    layers, cheapest = min(admitted, key=lambda each: each[1].asked.cost.weight)
    share_out(layers, cheapest.level)
    if not _pays(original, layers, cheapest):
        return None
    selection = Selection(
        kind="gate", thresholds=[layer.threshold for layer in layers],
        chosen=[float(layer.often.mean()) for layer in layers], fired=[layer.fired for layer in layers],
        tokens=sum(len(text) - 1 for text in judged), perplexity_exact=cheapest.found.perplexity_exact,
        perplexity=cheapest.found.perplexity,
    )  # fmt: skip
    return Gated(layers, selection)


def _fit(original: Original, i: int, calibration: Calibration) -> tuple[GatedLayer, ...]:
    """Takes the texts through layer `i` and finds the thresholds of its gates: with none preferred, and with some."""
    seen = calibration.layer(i)
    down = original.weights.ffns(i)[0].down.rows()
    gates = calibration.gates(i, seen.h)
    return fit(gates, seen, down, calibration.states, original.model.activation in SPARSE)


def _most(
    original: Original, judged: Sequence[Numbers], exact: Calibration, layers: Sequence[GatedLayer], max_loss: float
) -> _Skipping:
    """The highest level that keeps to the loss, or the lowest that was tried if none does."""
    levels = (0.0,) if original.model.activation in SPARSE else LEVELS
    first, last = 0, len(levels) - 1
    admitted = least = None
    while first <= last:
        at = (first + last) // 2
        tried = _try(original, judged, exact, layers, levels[at])
        if tried.found.loss <= max_loss:
            admitted, first = tried, at + 1
        else:
            least, last = tried, at - 1
    found = admitted or least
    assert found is not None
    return found


def _try(
    original: Original, judged: Sequence[Numbers], exact: Calibration, layers: Sequence[GatedLayer], level: float
) -> _Skipping:
    """Measures a level on the judging texts."""
    share_out(layers, level)
    tried = original.calibration(judged)
    asked = Asked(pair_format(original.model, original.formats).nbytes)
    for i, layer in enumerate(layers):

        def chooses(_expert: int, h: Floats, i: int = i, layer: GatedLayer = layer) -> Mask:
            chosen = layer.chosen(tried.gates(i, h))
            asked.count(layer.missed(chosen))
            return chosen

        tried.mixture(i, chooses)
    (found,) = judge(exact, [tried])
    log.info(
        "gates that skip %.0f %% of %s: perplexity %+.2f %%, KL %.4f, %.0f KiB in %.0f reads a token",
        100 * level, "the colder half" if layers[0].preferred.any() else "neurons", 100 * found.loss,
        found.divergence, asked.cost.nbytes / 1024, asked.cost.reads,
    )  # fmt: skip
    return _Skipping(level, found, asked)


def _pays(original: Original, layers: Sequence[GatedLayer], skipping: _Skipping) -> bool:
    """Whether a card reads the chosen neurons so much faster than all of them that it is worth the loss. Logs it."""
    some, everything = skipping.asked.cost, skipping.asked.of_all(original.model.neurons)
    takes = some.weight / everything.weight
    pays = takes <= WORTH
    log.warning(
        "%s: packed %s: its gates skip %.1f %% of neurons, perplexity %+.2f %%; with RAM for half of them those"
        " chosen take a card %.0f %% of the time of all (%.0f KiB in %.0f reads a token, %.0f KiB in %.0f), and"
        " up to %.0f %% are worth it",
        original.path, "with gates that choose" if pays else "exact",
        100 * (1 - float(np.mean([layer.often.mean() for layer in layers]))), 100 * skipping.found.loss, 100 * takes,
        some.nbytes / 1024, some.reads, everything.nbytes / 1024, everything.reads, 100 * WORTH,
    )  # fmt: skip
    return pays
