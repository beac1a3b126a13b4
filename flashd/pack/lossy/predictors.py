"""Low-rank predictors of which neurons fire, trained on sample text (section 3.1 of "LLM in a flash").

The predictor of a layer, or of each expert of one, is two thin matrices. It starts as the best approximation of that
rank to the FFN's own input matrix on the text's hidden states, and goes on by logistic regression in which what fires
weighs as much as what does not, each neuron by its share in the output: missing one costs quality, a needless one
costs a read. Of an expert only the tokens that are routed to it count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.formats import RowFormat
from flashd.bundle.header import PREDICTOR_ROWS
from flashd.bundle.prefix import GAP_BYTES, PAGE
from flashd.bundle.reader import dequantise
from flashd.bundle.row_kinds import BLOCK, Bytes, Floats
from flashd.errors import DataError
from flashd.pack.lossy.calibration import Mask, Numbers, Seen
from flashd.pack.rounding.rows import encode_rows

SPARSE = frozenset({"relu", "relu2", "drelu", "fatrelu"})
"""Activations that are zero for most neurons."""

MOST_TOKENS = 24_000
LEAST_TEXTS = 8
FIT, CHOOSE = 0.7, 0.15
"""Parts of the texts that predictors are fitted on, and that thresholds are chosen on; the rest judges them."""

LOST = (0.3, 0.2, 0.15, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
"""Parts of the neurons' shares in a layer's output that may be missed: the first that keeps to the loss is taken."""

DENSE = 0.6
"""Where more than this share of a layer's neurons would be chosen anyway, all of them are."""

LEAST_TOKENS = 64
"""Of an expert that fewer tokens of the text were routed to, all neurons take part."""

ALWAYS = np.float32(1e9)
"""More than any score."""

WORTH = 0.8
"""Of the card's time for whole experts, the most that single neurons may take: they cost quality and RAM too."""

BATCH, PASSES, RATE = 256, 6, 3e-3
MOST_BALANCE = 8.0


@dataclass(frozen=True)
class Selecting:
    """What the user asks of a selection."""

    text: str
    max_loss: float = 0.01  # of perplexity, in parts of it
    rank: int | None = None  # of the predictors but the last quarter's, which have twice as much


@dataclass(frozen=True)
class Texts:
    """Tokens of the sample in texts of the model's context."""

    fit: list[Numbers]
    choose: list[Numbers]
    judge: list[Numbers]

    @classmethod
    def cut(cls, tokens: Numbers, context: int) -> Texts:
        """Raises DataError where there are too few."""
        length = min(context, 512)
        texts = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        texts = texts[: MOST_TOKENS // length]
        if len(texts) < LEAST_TEXTS:
            raise DataError(
                f"a predictor needs {LEAST_TEXTS * length} tokens of sample text and the text has {len(tokens)};"
                " give a longer one with --text"
            )
        fit, choose = (int(len(texts) * part) for part in (FIT, FIT + CHOOSE))
        return cls(texts[:fit], texts[fit:choose], texts[choose:])


def rank_of(layer: int, model: Architecture, asked: int | None) -> int:
    """A layer's rank: a sixteenth of the hidden size, or what was asked; twice that in the last quarter of layers.

    Experts that have fewer neurons than that have predictors in proportion.
    """
    base = asked or min(model.hidden, model.expert_neurons) // 16
    rank = base * (2 if layer >= model.layers - model.layers // 4 else 1)
    return -(-rank // BLOCK) * BLOCK


class Predictor:
    """One FFN's. Neurons are in the order of the card."""

    def __init__(self, to_rank: Floats, from_rank: Floats, lean: Floats) -> None:
        self.rank = len(to_rank)
        self._forms = RowFormat(PREDICTOR_ROWS, to_rank.shape[1]), RowFormat(PREDICTOR_ROWS, self.rank)
        self.to_rank: Bytes = encode_rows(to_rank, self._forms[0])
        self.from_rank: Bytes = encode_rows(from_rank, self._forms[1])
        self.lean = lean

    def scores(self, h: Floats) -> Floats:
        """[N, F] of h [N, H], as the engine has them."""
        to_rank, from_rank = (
            dequantise(form.views(raw), form.kind)
            for form, raw in zip(self._forms, (self.to_rank, self.from_rank), strict=True)
        )
        return np.asarray(h @ to_rank.T @ from_rank.T + self.lean, np.float32)


@dataclass(frozen=True)
class PredictedFfn:
    """One FFN of a layer, its only one or an expert: its predictor, and what its threshold is chosen by."""

    order: Numbers  # of its neurons on the card; those from `own` on only fill it up
    own: int
    predictor: Predictor
    tokens: Numbers  # [N] that it took part in, of the texts that thresholds are chosen on
    fired: int  # activations of all texts that are not zero


@dataclass(frozen=True)
class Scored:
    """The scores of what fired in the texts that thresholds are chosen on, and its shares in the output."""

    scores: Floats
    shares: Floats


@dataclass
class PredictedLayer:
    """A layer's predictors, and how the neurons of its texts scored."""

    parts: list[PredictedFfn]  # in the order of the card
    experts: Numbers  # their numbers in the source
    h: Floats  # [N, H] of the texts that thresholds are chosen on
    fired: float  # share of its neurons in all texts
    scores: Floats  # of what fired where thresholds are chosen, ascending
    below: Floats  # of the same, what of all shares in the output stands below
    threshold: float = 0.0
    dense: bool = False

    @property
    def rank(self) -> int:
        """0 where no predictor is asked."""
        return 0 if self.dense else self.parts[0].predictor.rank

    def choose(self, lost: float) -> None:
        """Sets the threshold so that at most `lost` of the shares is missed."""
        at = int(np.searchsorted(self.below, lost, side="right"))
        self.threshold = float(self.scores[min(at, len(self.scores) - 1)]) - 1e-4 if len(self.scores) else 0.0
        self.dense = False
        chosen = sum(int(self.chosen_of_texts(part).sum()) for part in self.parts)
        self.dense = chosen > DENSE * sum(len(part.tokens) * len(part.order) for part in self.parts)

    def chosen_of_texts(self, part: PredictedFfn) -> Mask:
        """[N, F]: which neurons take part in the part's tokens."""
        return self.chosen(part, self.h[part.tokens])

    def chosen(self, part: PredictedFfn, h: Floats) -> Mask:
        """[N, F]: which neurons take part, in the order of the card."""
        if self.dense:
            return np.ones((len(h), len(part.order)), np.bool_)
        return part.predictor.scores(h) > self.threshold

    def chosen_of_source(self, expert: int, h: Floats) -> Mask:
        """[N, F] of an expert, number and neurons as the source has them."""
        part = self.parts[self.experts.tolist().index(expert)]
        return self.chosen(part, h)[:, np.argsort(part.order)[: part.own]]

    def rates(self) -> Floats:
        """[F]: how often each neuron of the layer takes part, in the order of the card."""
        uses = np.concatenate([self.chosen_of_texts(part).sum(0) for part in self.parts])
        return (uses / len(self.h)).astype(np.float32)


def joined(
    parts: Mapping[int, tuple[PredictedFfn, Scored]], experts: Numbers, h: Floats, fired: float
) -> PredictedLayer:
    """The layer of some parts, by their numbers in the source; `experts` is their order on the card."""
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
    """A predictor, from what was seen in the texts: the first `fitted` tokens train it.

    Args:
        tokens: the numbers of the others, among all that thresholds are chosen on.
        order: the neurons in the order of the card; those behind the FFN's own only fill it up.
        matrix: the input matrix that decides, [F, H].
        bias: [F].
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
    # nothing is missed of what always takes part
    fires = (rest > 0) & (lean < ALWAYS)
    scored = Scored(predictor.scores(h)[:, : len(own)][fires], rest[fires])
    return PredictedFfn(order, len(own), predictor, tokens, int(np.count_nonzero(seen.a))), scored


def _nearest(h: Floats, matrix: Floats, rank: int) -> tuple[Floats, Floats]:
    """(narrow [r, H], wide [F, r]): of all pairs of that rank, the closest to h times `matrix`."""
    values, vectors = np.linalg.eigh((h.T @ h / len(h)).astype(np.float64))
    root = np.sqrt(np.maximum(values, 1e-6 * values[-1]))
    u, s, v = np.linalg.svd(matrix @ (vectors * root), full_matrices=False)
    from_rank = u[:, :rank] * s[:rank]
    to_rank = v[:rank] / root @ vectors.T
    return to_rank.astype(np.float32), from_rank.astype(np.float32)


def _trained(
    h: Floats, weights: Floats, to_rank: Floats, from_rank: Floats, lean: Floats
) -> tuple[Floats, Floats, Floats]:
    """Adam on the logistic loss. weights [N, F]: each neuron's share in the output, 0 where it did not fire."""
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
        x, y = h[rows], fired[rows]
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
    inner = x @ to_rank.T  # [B, r]
    scores = np.clip(inner @ from_rank.T + lean, -30, 30)
    wrong = (1 / (1 + np.exp(-scores)) - fired) * importance / np.float32(len(x))  # [B, F]
    return [(wrong @ from_rank).T @ x, wrong.T @ inner, wrong.sum(0)]


@dataclass(frozen=True)
class Cost:
    """What a token asks of the card where nothing is in RAM."""

    nbytes: float
    reads: float

    @property
    def weight(self) -> float:
        """Bytes that an SD card gives in that time."""
        return self.nbytes + self.reads * GAP_BYTES


def cost_of_neurons(layers: Sequence[PredictedLayer], nbytes: int) -> Cost:
    """Of the neurons, of so many bytes each, that the layers' predictors choose; what lies close is one read."""
    units, reads = 0.0, 0.0
    for layer in layers:
        for part in layer.parts:
            of_part = spans(layer.chosen_of_texts(part), nbytes)
            units, reads = units + of_part[0] / len(layer.h), reads + of_part[1] / len(layer.h)
    return cost(units * nbytes, reads)


def spans(chosen: Mask, nbytes: int) -> tuple[int, int]:
    """(neurons that are read, reads) for those of so many bytes that tokens need, [N, F] in the order of the card."""
    tokens, at = np.nonzero(chosen)
    gaps = np.diff(at) - 1
    bridged = (np.diff(tokens) == 0) & (gaps * nbytes <= GAP_BYTES)
    return len(at) + int(gaps[bridged].sum()), len(at) - int(bridged.sum())


def cost_of_experts(model: Architecture, nbytes: int) -> Cost:
    """Of the experts that a token uses, of so many bytes each."""
    assert model.experts is not None
    used = model.layers * model.experts.used
    return cost(used * nbytes, used)


def cost(nbytes: float, reads: float) -> Cost:
    """Of so many bytes in so many reads."""
    return Cost(nbytes + reads * PAGE, reads)  # a card gives whole pages
