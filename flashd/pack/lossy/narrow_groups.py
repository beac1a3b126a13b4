"""Fewer bits for the groups of one layer that matter least: how errors are weighed, and which groups they allow.

narrow_search.py tries budgets of errors on whole models and decides. A card starts a read in the time that it needs
for some 16 KiB. So if every second neuron takes part, single neurons cannot be read faster than all. Fewer bytes for
each neuron always help.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from flashd.bundle.arrays import Groups
from flashd.bundle.header import Narrowed
from flashd.bundle.reader import dequantise
from flashd.bundle.rows.formats import GroupFormat
from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.lossy.calibration import Calibration, Dense, Numbers, Seen, text_tokens
from flashd.pack.rounding.gptq import factor

log = logging.getLogger(__name__)

KEPT = 4
"""One group in so many, the hottest, keeps its 4 bits: even a small RAM holds these groups."""


@dataclass(frozen=True)
class ErrorBudget:
    """The most that the errors of a layer's narrow groups may sum up to, in parts of the hidden states' squares."""

    int3: float  # of groups of 3 bits
    int2: float  # of groups of 2 bits


ERROR_BUDGETS = (
    ErrorBudget(np.inf, 2e-5), ErrorBudget(np.inf, 0), ErrorBudget(1e-4, 0), ErrorBudget(2.5e-5, 0),
    ErrorBudget(1e-5, 0), ErrorBudget(4e-6, 0),
)  # fmt: skip
"""The budgets that are tried. The first gives the fewest bytes. In Qwen2.5-Coder-1.5B it gave 3 bits to 57 % of the
groups and 2 bits to 18 %. The others gave 3 bits to 75, 67, 55, 37 and 16 %. They raised perplexity by 3.6, 2.0, 1.2,
0.9, 0.6 and 0.3 % on 1,533 tokens. Without the feedback of gptq.py 75 % cost 5.5 %. In SmolLM2-135M, with 3 bits for
75 %, feedback gave a KL of 0.123 and not 0.150, and 13.9 % and not 15.9."""

LENGTH = 512
"""Tokens of a text."""

FIT, JUDGED = 11, 3
"""How many texts errors are weighed on, and how many others judge the result. Measured on layers 5, 13 and 21 of
Qwen2.5-Coder-1.5B: with four times as many tokens as inputs, feedback reduces the outputs' error on other text by 22
to 32 %; with a third of these tokens by 11 to 20 %."""

LEAST = np.float32(1e-3)
"""The least weight of an error, in parts of the mean."""

TOKENS = 256
"""Tokens of the first text on which the groups' errors are compared."""

ROWS = 32
"""Tokens whose logits are compared together. There is a row of logits for each token and each try."""


@dataclass(frozen=True)
class Narrowing:
    """What the user allows fewer bits to cost."""

    max_loss: float  # the most by which perplexity may rise: 0.01 is one per cent
    text: str | None = None  # text like that which the model will meet; None: text that ships with flashd


@dataclass(frozen=True)
class Weigh:
    """How much errors of a layer's weights count, by the numbers that each weight is multiplied by.

    Every weight counts for something: another text may use what this one did not.
    """

    inputs: Floats  # [H, H], see gptq.factor; 264 MB for all layers of Qwen2.5-Coder-1.5B; or [H], mean squares
    neurons: Floats  # [F], the mean squares of activations

    @classmethod
    def of(cls, seen: Seen) -> Weigh:
        """The weights from what a layer's FFN computed."""
        inputs, neurons = (np.square(values).mean(0) for values in (seen.h, seen.a))  # [H], [F]
        return cls(factor(seen.h, _counting(inputs)), _counting(neurons))

    @classmethod
    def apart(cls, seen: Seen) -> Weigh:
        """The weights from what few tokens computed: too few to tell how inputs go together, see gptq.factor."""
        return cls(_counting(np.square(seen.h).mean(0)), _counting(np.square(seen.a).mean(0)))


def _counting(means: Floats) -> Floats:
    return np.asarray(means + LEAST * means.mean() + np.float32(1e-30), np.float32)


@dataclass(frozen=True)
class Starts:
    """The first group of a layer that has 3 bits, and the first that has 2."""

    int3: int
    int2: int


@dataclass(frozen=True)
class Judgement:
    """How a model with other weights does on some texts, compared with the exact one."""

    perplexity_exact: float
    perplexity: float
    divergence: float  # mean KL from the exact model, in nats

    @property
    def loss(self) -> float:
        """By how much perplexity is higher: 0.01 is one per cent."""
        return self.perplexity / self.perplexity_exact - 1


def cut(tokenizer_json: bytes, text: str | None, context: int) -> tuple[list[Numbers], list[Numbers]]:
    """(FIT texts to weigh on, JUDGED texts to judge by), each [tokens], spread over `text`.

    If `text` is None, text that ships with flashd is used. Raises DataError if the text is too short.
    """
    tokens = text_tokens(tokenizer_json, "".join(_own_text()) if text is None else text)
    length, wanted = min(context, LENGTH), FIT + JUDGED
    texts = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    if len(texts) < wanted:
        raise DataError(
            f"to measure a loss takes {wanted * length} tokens of sample text, but the text has {len(tokens)}; give a"
            " longer one with --text"
        )
    spread = [texts[at * len(texts) // wanted] for at in range(wanted)]
    judged = set(range(2, 4 * JUDGED, 4))
    return [t for i, t in enumerate(spread) if i not in judged], [spread[i] for i in sorted(judged)]


def _own_text(folder: Traversable | None = None) -> Iterator[str]:
    """The sample text and flashd's own modules: prose and code that are in the package anyway."""
    if folder is None:
        yield files("flashd.pack").joinpath("sample.txt").read_text("utf-8")
        folder = files("flashd")
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _own_text(entry)
        elif entry.name.endswith(".py"):
            yield entry.read_text("utf-8")


def floats(groups: Groups, form: GroupFormat) -> Dense:
    """Groups of 4 bits as matrices."""
    n, m = form.neurons, form.inputs
    inputs = dequantise(groups.inputs.joined(), "int4").reshape(-1, m, n, form.hidden)  # [g, M, N, H]
    down = dequantise(groups.down.joined(), "int4").reshape(-1, form.hidden, n)  # [g, H, N]
    biases = groups.bias.reshape(len(groups), -1, n).transpose(0, 2, 1).reshape(len(groups) * n, -1)  # [g N, M]
    return Dense(
        [inputs[:, k].reshape(-1, form.hidden) for k in range(m)],
        biases,
        down.transpose(1, 0, 2).reshape(form.hidden, -1),
    )


def joined(parts: Sequence[Dense]) -> Dense:
    """One FFN with the neurons of all parts, part by part."""
    return Dense(
        [np.concatenate(inputs) for inputs in zip(*(part.inputs for part in parts), strict=True)],
        np.concatenate([part.biases for part in parts]),
        np.concatenate([part.down for part in parts], axis=1),
    )


def group_errors(calibration: Calibration, seen: Seen, exact: Dense, narrow: Dense, neurons: int) -> Floats:
    """[groups] of so many neurons: the squared error of each one's share in the output.

    Errors are in parts of the hidden states' squares.

    If a norm follows the FFN, what is added to the states has another size. That is the same for all groups of a
    layer.
    """
    h = seen.h[:TOKENS]
    size = float(np.square(calibration.states[:TOKENS]).sum())
    a, b = calibration.activate(exact, h), calibration.activate(narrow, h)  # [N, F]
    out = np.empty(a.shape[1] // neurons, np.float32)
    for g in range(len(out)):
        part = slice(g * neurons, (g + 1) * neurons)
        out[g] = np.square(a[:, part] @ exact.down[:, part].T - b[:, part] @ narrow.down[:, part].T).sum() / size
    return out


def starts(int3: Floats, int2: Floats, budget: ErrorBudget) -> Starts:
    """As many narrow groups as the budget allows.

    int3 and int2 are the errors of each group with 3 and with 2 bits, [n], of the layer's last n groups, which are
    the coldest. The result counts groups from the first of these.
    """
    from_2 = _last(int2, budget.int2)
    return Starts(_last(int3[:from_2], budget.int3), from_2)


def _last(errors: Floats, budget: float) -> int:
    """The first entry from which on the errors [n] sum up to no more than the budget."""
    behind = np.cumsum(errors[::-1], dtype=np.float64)  # [n]
    return len(errors) - int(np.searchsorted(behind, budget, side="right"))


def judge(exact: Calibration, others: Sequence[Calibration]) -> list[Judgement]:
    """Compares others with `exact`, which all have been taken through all layers with the same texts."""
    lost, divergence, counted = np.zeros(len(others) + 1), np.zeros(len(others)), 0
    for rows, following in exact.pieces(ROWS):
        right = np.arange(len(following))
        # the head's weights are read once for all of them
        h = np.concatenate([each.finished(rows) for each in (exact, *others)])  # [(others + 1) * n, H]
        logits = np.split(exact.head(h), len(others) + 1)  # each [n, V]
        expected = _log_softmax(logits[0])
        lost[0] -= expected[right, following].sum()
        for i, of_other in enumerate(logits[1:]):
            found = _log_softmax(of_other)
            lost[i + 1] -= found[right, following].sum()
            divergence[i] += (np.exp(expected) * (expected - found)).sum()
        counted += len(following)
    perplexity = np.exp(lost / counted)
    return [
        Judgement(float(perplexity[0]), float(perplexity[i + 1]), max(0.0, float(divergence[i] / counted)))
        for i in range(len(others))
    ]


def admitted(path: Path, narrow: Sequence[bool], found: Sequence[Judgement], max_loss: float) -> int | None:
    """The number of the first try that narrows something and keeps to the loss. None if there is none; logs why.

    `narrow`: of each try, whether it narrows something. `path`: the model's.
    """
    for number, (some, judgement) in enumerate(zip(narrow, found, strict=True)):
        if some and judgement.loss <= max_loss:
            return number
    log.warning(
        "%s: the least that was tried raises perplexity by %.2f %%, which is more than %.2f %%: packed exact",
        path, 100 * min(judgement.loss for judgement in found), 100 * max_loss,
    )  # fmt: skip
    return None


def narrowed(starts: Sequence[Starts], judged: Sequence[Numbers], judgement: Judgement) -> Narrowed:
    """The header's words for the narrow groups of each layer, and for what they cost on the judging texts."""
    return Narrowed(
        int3=[s.int3 for s in starts], int2=[s.int2 for s in starts], tokens=sum(len(text) - 1 for text in judged),
        perplexity_exact=judgement.perplexity_exact, perplexity=judgement.perplexity,
        divergence=judgement.divergence,
    )  # fmt: skip


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), np.float32)
