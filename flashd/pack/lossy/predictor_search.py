"""The search over all layers: predictors that choose the fewest neurons within a loss, and whether that pays.

predictors.py trains the predictors of one layer. This module judges whole models and decides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashd.bundle.header import Selection, group_format, neuron_format
from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.lossy.calibration import Calibration, Seen, text_tokens
from flashd.pack.lossy.card_order import card_order, filled
from flashd.pack.lossy.predictors import (
    LEAST_TOKENS,
    LOST,
    SPARSE,
    WORTH,
    PredictedFfn,
    PredictedLayer,
    Scored,
    Selecting,
    Texts,
    cost_of_experts,
    cost_of_neurons,
    fit,
    joined,
    rank_of,
)
from flashd.pack.original import Original
from flashd.pack.weights.matrix import Numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """The layers with their predictors, and what these cost."""

    layers: Sequence[PredictedLayer]
    rates: Floats  # [L, F], how often each neuron takes part
    selection: Selection


def check(original: Original) -> None:
    """Raises DataError for a model whose neurons no predictor can choose."""
    model, path = original.model, original.path
    if model.layer_neurons:
        raise DataError(f"{path}: neurons of FFNs of several widths cannot be selected; pack it with --select exact")
    if model.bounds:
        raise DataError(f"{path}: gates that have a bound cannot have a predictor; pack it with --select exact")
    if original.formats.ffn == "ternary" or model.normed_neurons:
        raise DataError(f"{path}: BitNet cannot have a predictor; pack it with --select exact")
    if model.experts and model.experts.leading:
        raise DataError(f"{path}: first layers without experts cannot have a predictor; pack it with --select exact")
    if model.experts and "down" in model.biases:
        raise DataError(
            f"{path}: experts whose outputs have a bias cannot have a predictor; pack it with --select exact"
        )
    if model.activation not in SPARSE:
        raise DataError(
            f"{path}: its activation {model.activation} makes few neurons zero; a predictor needs one of"
            f" {', '.join(sorted(SPARSE))}; pack it with --select exact"
        )


def choose(original: Original, tokenizer_json: bytes, selecting: Selecting) -> Selected | None:
    """The layers' predictors, with the thresholds that choose the fewest neurons. None if that does not pay.

    Raises DataError if every threshold raises perplexity by more than is allowed, or for too short a text.
    """
    texts = Texts.cut(text_tokens(tokenizer_json, selecting.text), original.model.context)
    calibration, fitted = original.calibration([*texts.fit, *texts.choose]), sum(len(text) for text in texts.fit)
    tokens = sum(len(text) for text in texts.choose)
    numbers = range(original.model.layers)
    layers = [_fit(original, i, calibration, fitted, tokens, selecting.rank) for i in numbers]
    exact = _judged(original, texts.judge, None)
    for lost in LOST:
        for layer in layers:
            layer.choose(lost)
        found = _judged(original, texts.judge, layers)
        if found <= exact * (1 + selecting.max_loss):
            break
    else:
        raise DataError(
            f"{original.path}: the best predictor raises perplexity by {100 * (found / exact - 1):.2f} %,"
            f" which is more than {100 * selecting.max_loss:.2f} %; pack it with --select exact or wider --rows,"
            " or give more text, or allow more"
        )
    if original.model.experts and not _pays(original, layers):
        return None
    often = np.stack([layer.rates() for layer in layers])
    selection = Selection(
        ranks=[layer.rank for layer in layers], thresholds=[layer.threshold for layer in layers],
        chosen=often.mean(1).tolist(), fired=[layer.fired for layer in layers],
        tokens=sum(len(text) - 1 for text in texts.judge), perplexity_exact=exact, perplexity=found,
    )  # fmt: skip
    return Selected(layers, often, selection)


def _fit(
    original: Original, i: int, calibration: Calibration, fitted: int, tokens: int, rank: int | None
) -> PredictedLayer:
    """Takes the texts through layer `i` and trains its predictors. The first `fitted` tokens train them.

    Thresholds are chosen on the `tokens` tokens that follow.
    """
    model, ffns, parts = original.model, original.weights.ffns(i), dict[int, tuple[PredictedFfn, Scored]]()
    h = np.zeros((tokens, model.hidden), np.float32)  # [tokens, H]; held once, however many experts a token uses

    def sees(number: int, uses: Numbers, seen: Seen) -> None:
        ffn, training = ffns[number], int(np.searchsorted(uses, fitted))
        h[uses[training:] - fitted] = seen.h[training:]
        known = training >= LEAST_TOKENS
        order = card_order(seen.a[:training] != 0) if known else np.arange(len(seen.reach))
        lean = ffn.biases[:, 0] if ffn.biases.size else np.zeros(len(ffn.biases), np.float32)
        parts[number] = fit(
            seen, training, uses[training:] - fitted, filled(order, model.expert_neurons),
            ffn.inputs[0].rows(slice(None)), lean - model.threshold, rank_of(i, model, rank),
        )  # fmt: skip

    hottest = calibration.mixture(i, sees=sees)
    own = ffns[0].neurons
    for number in set(range(len(ffns))) - set(parts):
        sees(number, np.zeros(0, np.int64), Seen.nothing(model.hidden, own))
    fired = sum(part.fired for part, _ in parts.values())
    return joined(parts, hottest, h, fired / ((fitted + tokens) * own * len(ffns)))


def _judged(original: Original, texts: Sequence[Numbers], layers: Sequence[PredictedLayer] | None) -> float:
    """The perplexity of texts: with all neurons, or with those that the layers' predictors choose."""
    judge, form = original.calibration(texts), neuron_format(original.model, original.formats)
    for i in range(original.model.layers):
        if layers:
            judge.mixture(i, layers[i].chosen_of_source, columns=form.row)
        else:
            judge.mixture(i)
    return judge.perplexity()


def _pays(original: Original, layers: Sequence[PredictedLayer]) -> bool:
    """Whether a card reads the chosen neurons so much faster than whole experts that it pays. Logs it."""
    model, formats = original.model, original.formats
    neurons = cost_of_neurons(layers, neuron_format(model, formats).nbytes)
    experts = cost_of_experts(model, model.expert_groups * group_format(model, formats).nbytes)
    takes = neurons.weight / experts.weight
    pays = takes <= WORTH
    log.warning(
        "%s: packed %s: single neurons take a card %.0f %% of the time of whole experts (%.0f KiB in %.0f reads a"
        " token, %.0f KiB in %.0f), and up to %.0f %% are worth a loss",
        original.path, "with single neurons" if pays else "exact, with whole experts", 100 * takes,
        neurons.nbytes / 1024, neurons.reads, experts.nbytes / 1024, experts.reads, 100 * WORTH,
    )  # fmt: skip
    return pays
