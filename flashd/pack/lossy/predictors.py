"""The low-rank predictors of one layer, which say what neurons fire ("LLM in a flash", section 3.1).

predictor_search.py judges these predictors on whole models and decides.

A layer has one predictor, or one for each expert. A predictor is two thin matrices and a bias. It begins as the best
approximation of its rank to the FFN's own input matrix on the hidden states of sample text. Logistic regression then
improves it. A neuron that fires weighs by its contribution to the output, since missing it costs quality; a neuron
that does not fire costs a read. For an expert only the tokens that use it count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import PREDICTOR_ROWS
from flashd.bundle.prefix import GAP_BYTES, PAGE
from flashd.bundle.reader import dequantise
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import BLOCK, Bytes, Floats
from flashd.errors import DataError
from flashd.pack.lossy.calibration import Mask, Numbers, Seen
from flashd.pack.rounding.rows import encode_rows

SPARSE = frozenset({"relu", "relu2", "drelu", "fatrelu"})
"""Activations that are zero for most neurons."""

MOST_TOKENS = 24_000
"""The most tokens of the sample text that are used."""

LEAST_TEXTS = 8

FIT, CHOOSE = 0.7, 0.15
"""The shares of the texts that train predictors, and that thresholds are chosen on. The rest judges them."""

LOST = (0.3, 0.2, 0.15, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
"""Shares of a layer's output that may be missed. They are tried in this order: the first that keeps to the loss is
taken."""

DENSE = 0.6
"""If more than this share of a layer's neurons would be chosen, all of them are."""

LEAST_TOKENS = 64
"""If fewer tokens of the text use an expert, all of its neurons take part."""

ALWAYS = np.float32(1e9)
"""More than any score."""

WORTH = 0.8
"""Single neurons may take at most this share of the card's time for whole experts: they cost quality and RAM too."""

BATCH, PASSES, RATE = 256, 6, 3e-3
"""Of the training: tokens a step, passes over the text, and the learning rate."""

MOST_BALANCE = 8.0
"""A neuron that fires weighs at most so much more than one that does not."""


@dataclass(frozen=True)
class Selecting:
    """What the user asks of a selection."""

    text: str  # text like that which the model will meet
    max_loss: float = 0.01  # the most by which perplexity may rise: 0.01 is one per cent
    rank: int | None = None  # of the predictors; in the last quarter of the layers it is twice as high


@dataclass(frozen=True)
class Texts:
    """The sample text in texts no longer than the model's context, each [tokens]."""

    fit: list[Numbers]  # train predictors
    choose: list[Numbers]  # choose thresholds
    judge: list[Numbers]  # judge the result

    @classmethod
    def cut(cls, tokens: Numbers, context: int) -> Texts:
        """Cuts `tokens` [n] into texts. Raises DataError if there are too few."""
        length = min(context, 512)
        texts = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        texts = texts[: MOST_TOKENS // length]
        if len(texts) < LEAST_TEXTS:
            raise DataError(
                f"a predictor needs {LEAST_TEXTS * length} tokens of sample text, but the text has {len(tokens)};"
                " give a longer one with --text"
            )
        fit, choose = (int(len(texts) * part) for part in (FIT, FIT + CHOOSE))
        return cls(texts[:fit], texts[fit:choose], texts[choose:])


def rank_of(layer: int, model: Architecture, asked: int | None) -> int:
    """The rank of a layer's predictors, a multiple of 32.

    It is `asked`, or else a sixteenth of the hidden size or of an expert's neurons, whichever is less. In the last
    quarter of the layers it is twice that.
    """
    base = asked or min(model.hidden, model.expert_neurons) // 16
    rank = base * (2 if layer >= model.layers - model.layers // 4 else 1)
    return -(-rank // BLOCK) * BLOCK


class Predictor:
    """The predictor of one FFN: scores = from_rank @ to_rank @ h + lean. Neurons are in the order of the card.

    In the file `to_rank` [rank, H] is the section "narrow", `from_rank` [F, rank] is "wide", `lean` [F] is "lean".
    """

    def __init__(self, to_rank: Floats, from_rank: Floats, lean: Floats) -> None:
        self.rank = len(to_rank)
        self._forms = RowFormat(PREDICTOR_ROWS, to_rank.shape[1]), RowFormat(PREDICTOR_ROWS, self.rank)
        self.to_rank: Bytes = encode_rows(to_rank, self._forms[0])
        self.from_rank: Bytes = encode_rows(from_rank, self._forms[1])
        self.lean = lean

    def scores(self, h: Floats) -> Floats:
        """The scores [N, F] of h [N, H], from the rounded rows that the engine uses."""
        to_rank, from_rank = (
            dequantise(form.views(raw), form.kind)
            for form, raw in zip(self._forms, (self.to_rank, self.from_rank), strict=True)
        )
        return np.asarray(h @ to_rank.T @ from_rank.T + self.lean, np.float32)


@dataclass(frozen=True)
class PredictedFfn:
    """One FFN of a layer, its only one or an expert, with its predictor."""

    order: Numbers  # [F], its neurons in the order of the card; those from number `own` on only fill the last block
    own: int  # neurons of the FFN itself
    predictor: Predictor
    tokens: Numbers  # [N], the tokens that use it, of those that thresholds are chosen on
    fired: int  # how many of its activations in all texts are not zero


@dataclass(frozen=True)
class Scored:
    """The activations that are not zero, in the texts that thresholds are chosen on."""

    scores: Floats  # [n], the predictor's
    shares: Floats  # [n], the sizes of their contributions to the output


@dataclass
class PredictedLayer:
    """A layer's predictors and their threshold."""

    parts: list[PredictedFfn]  # its FFNs in the order of the card
    experts: Numbers  # [E], their numbers in the source
    h: Floats  # [N, H], the FFNs' input in the texts that thresholds are chosen on
    fired: float  # the share of its activations in all texts that are not zero
    scores: Floats  # [n], of the activations that are not zero, ascending
    below: Floats  # [n], the share of the output that is missed if the threshold is above this score
    threshold: float = 0.0
    dense: bool = False  # whether all neurons take part

    @property
    def rank(self) -> int:
        """The rank of its predictors; 0 if all neurons take part."""
        return 0 if self.dense else self.parts[0].predictor.rank

    def choose(self, lost: float) -> None:
        """Sets the threshold so that at most the share `lost` of the output is missed."""
        at = int(np.searchsorted(self.below, lost, side="right"))
        self.threshold = float(self.scores[min(at, len(self.scores) - 1)]) - 1e-4 if len(self.scores) else 0.0
        self.dense = False
        chosen = sum(int(self.chosen_of_texts(part).sum()) for part in self.parts)
        self.dense = chosen > DENSE * sum(len(part.tokens) * len(part.order) for part in self.parts)

    def chosen_of_texts(self, part: PredictedFfn) -> Mask:
        """[N, F]: which neurons of an FFN take part in the tokens that use it."""
        return self.chosen(part, self.h[part.tokens])

    def chosen(self, part: PredictedFfn, h: Floats) -> Mask:
        """[N, F]: which neurons of an FFN take part, for h [N, H]. They are in the order of the card."""
        if self.dense:
            return np.ones((len(h), len(part.order)), np.bool_)
        return part.predictor.scores(h) > self.threshold

    def chosen_of_source(self, expert: int, h: Floats) -> Mask:
        """[N, F]: which neurons of an expert take part, for h [N, H]. All numbers are those of the source."""
        part = self.parts[self.experts.tolist().index(expert)]
        return self.chosen(part, h)[:, np.argsort(part.order)[: part.own]]

    def rates(self) -> Floats:
        """[F]: how often each neuron of the layer takes part, in the order of the card."""
        uses = np.concatenate([self.chosen_of_texts(part).sum(0) for part in self.parts])
        return (uses / len(self.h)).astype(np.float32)


def joined(
    parts: Mapping[int, tuple[PredictedFfn, Scored]], experts: Numbers, h: Floats, fired: float
) -> PredictedLayer:
    """A layer of FFNs, given by their numbers in the source. `experts` [E] is their order on the card."""
    scores, shares = (
        np.concatenate([getattr(scored, name) for _, scored in parts.values()]) for name in ("scores", "shares")
    )
    by_score = np.argsort(scores)
    total = np.cumsum(shares[by_score], dtype=np.float64)
    below = (total / total[-1:]).astype(np.float32)
    return PredictedLayer([parts[n][0] for n in experts.tolist()], experts, h, fired, scores[by_score], below)


def fit(
    seen: Seen, fitted: int, tokens: Numbers, order: Numbers, matrix: Floats, bias: Floats, rank: int
) -> tuple[PredictedFfn, Scored]:
    """Trains the predictor of one FFN.

    Args:
        seen: what the FFN computed in the texts.
        fitted: so many tokens of `seen`, the first, train it.
        tokens: the numbers [N] of the other tokens, among all that thresholds are chosen on.
        order: the neurons in the order of the card, [F]; those behind the FFN's own only fill the last block.
        matrix: the input matrix whose products decide what fires, [own, H].
        bias: of these products, [own].
        rank: of the predictor.
    """
    own = order[order < len(matrix)]
    weights = np.abs(seen.a[:, own]) * seen.reach[own]
    if fitted < LEAST_TOKENS:
        to_rank, from_rank = np.zeros((rank, matrix.shape[1]), np.float32), np.zeros((len(own), rank), np.float32)
        lean = np.full(len(own), ALWAYS)
    else:
        to_rank, from_rank = _nearest(seen.h[:fitted], matrix[own], rank)
        to_rank, from_rank, lean = _trained(seen.h[:fitted], weights[:fitted], to_rank, from_rank, bias[own])
    filling = len(order) - len(own)
    predictor = Predictor(
        to_rank, np.pad(from_rank, ((0, filling), (0, 0))), np.pad(lean, (0, filling), constant_values=-ALWAYS)
    )
    h, rest = seen.h[fitted:], weights[fitted:]
    # nothing is missed if all neurons take part anyway
    fires = (rest > 0) & (lean < ALWAYS)
    scored = Scored(predictor.scores(h)[:, : len(own)][fires], rest[fires])
    return PredictedFfn(order, len(own), predictor, tokens, int(np.count_nonzero(seen.a))), scored


def _nearest(h: Floats, matrix: Floats, rank: int) -> tuple[Floats, Floats]:
    """(to_rank [r, H], from_rank [F, r]): the pair that is closest to matrix [F, H] on the inputs h [N, H]."""
    values, vectors = np.linalg.eigh((h.T @ h / len(h)).astype(np.float64))
    root = np.sqrt(np.maximum(values, 1e-6 * values[-1]))
    u, s, v = np.linalg.svd(matrix @ (vectors * root), full_matrices=False)
    from_rank = u[:, :rank] * s[:rank]
    to_rank = v[:rank] / root @ vectors.T
    return to_rank.astype(np.float32), from_rank.astype(np.float32)


def _trained(
    h: Floats, weights: Floats, to_rank: Floats, from_rank: Floats, lean: Floats
) -> tuple[Floats, Floats, Floats]:
    """Improves a predictor by Adam on the logistic loss.

    Args:
        h: [N, H].
        weights: the size of each neuron's contribution to the output, [N, F]; 0 if it did not fire.
        to_rank, from_rank, lean: the predictor to begin with, [r, H], [F, r] and [F].
    """
    random = np.random.default_rng(0)
    spread = np.float32(2 / max(float((h[:BATCH] @ to_rank.T @ from_rank.T + lean).std()), 1e-6))
    parameters = [to_rank, from_rank * spread, lean * spread]
    fired = weights > 0
    balance = np.float32(min(MOST_BALANCE, max(1.0, 1 / max(float(fired.mean()), 1e-6) - 1)))
    typical = np.float32(weights[fired].mean()) if fired.any() else np.float32(1)
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    steps = PASSES * max(1, len(h) // BATCH)
    for step in range(1, steps + 1):
        rows = random.integers(0, len(h), BATCH)
        x, y = h[rows], fired[rows]  # [B, H], [B, F]
        importance = np.where(y, balance * np.clip(weights[rows] / typical, 0.2, 4), 1).astype(np.float32)
        rate = RATE * min(1.0, 2 * (1 - step / (steps + 1)))
        for p, g, (m, v) in zip(parameters, _gradients(x, y, importance, *parameters), moments, strict=True):
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.01) * (g * g - v)
            scale = np.float32(rate * np.sqrt(1 - 0.99**step) / (1 - 0.9**step) * max(float(p.std()), 1e-3))
            p -= scale * 10 * m / (np.sqrt(v) + np.float32(1e-8))
    return parameters[0], parameters[1], parameters[2]


def _gradients(
    x: Floats, fired: Mask, importance: Floats, to_rank: Floats, from_rank: Floats, lean: Floats
) -> list[Floats]:
    """The gradients of to_rank, from_rank and lean for a batch: x [B, H], fired and importance [B, F]."""
    inner = x @ to_rank.T  # [B, r]
    scores = np.clip(inner @ from_rank.T + lean, -30, 30)  # [B, F]
    wrong = (1 / (1 + np.exp(-scores)) - fired) * importance / np.float32(len(x))  # [B, F]
    return [(wrong @ from_rank).T @ x, wrong.T @ inner, wrong.sum(0)]


@dataclass(frozen=True)
class Cost:
    """What a token asks of the card if nothing is in RAM."""

    nbytes: float
    reads: float

    @property
    def weight(self) -> float:
        """The bytes that an SD card gives in the same time in one long read."""
        return self.nbytes + self.reads * GAP_BYTES


def cost_of_neurons(layers: Sequence[PredictedLayer], nbytes: int) -> Cost:
    """The cost of the neurons that the layers' predictors choose, of `nbytes` each. Close neighbours are one read."""
    units, reads = 0.0, 0.0
    for layer in layers:
        for part in layer.parts:
            of_part = spans(layer.chosen_of_texts(part), nbytes)
            units, reads = units + of_part[0] / len(layer.h), reads + of_part[1] / len(layer.h)
    return cost(units * nbytes, reads)


def spans(chosen: Mask, nbytes: int) -> tuple[int, int]:
    """(neurons read, reads) for the neurons that N tokens need, [N, F] in the order of the card, of `nbytes` each."""
    tokens, at = np.nonzero(chosen)
    gaps = np.diff(at) - 1
    bridged = (np.diff(tokens) == 0) & (gaps * nbytes <= GAP_BYTES)
    return len(at) + int(gaps[bridged].sum()), len(at) - int(bridged.sum())


def cost_of_experts(model: Architecture, nbytes: int) -> Cost:
    """The cost of the experts that a token uses, of `nbytes` each."""
    assert model.experts is not None
    used = model.layers * model.experts.used
    return cost(used * nbytes, used)


def cost(nbytes: float, reads: float) -> Cost:
    """The cost of `nbytes` in `reads` reads."""
    return Cost(nbytes + reads * PAGE, reads)  # a card gives whole pages
