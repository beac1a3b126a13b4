"""Fewer bits for the groups that matter least, as many as an allowed loss admits.

On a card a read costs as much time as some 16 KiB of it, so neurons of which one in two takes part cannot be read one
by one; that each of them is fewer bytes helps always. Which layers bear it is measured, and what it costs in all is
measured on text that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np

from flashd.bundle.arrays import QuantGroups, QuantRows
from flashd.bundle.bits import unpack
from flashd.bundle.reader import dequantise
from flashd.bundle.row_kinds import BLOCK, Floats, unit_steps
from flashd.errors import DataError
from flashd.pack.lossy.calibration import Calibration, Dense, Numbers, Seen, text_tokens
from flashd.pack.rounding.gptq import factor

KEPT = 4
"""The hottest one in so many groups keeps its 4 bits: where there is any RAM at all, they are in it."""


@dataclass(frozen=True)
class ErrorBudget:
    """The errors of a layer's narrow groups that are admitted, in parts of the hidden states."""

    int3: float
    int2: float


ERROR_BUDGETS = (
    ErrorBudget(np.inf, 2e-5), ErrorBudget(np.inf, 0), ErrorBudget(1e-4, 0), ErrorBudget(2.5e-5, 0),
    ErrorBudget(1e-5, 0), ErrorBudget(4e-6, 0),
)  # fmt: skip
"""What is tried, the fewest bytes first. Of the groups of Qwen2.5-Coder-1.5B they gave 57 % 3 bits and 18 % 2, then
3 bits to 75, 67, 55, 37 and 16 %, which cost 3.6, 2.0, 1.2, 0.9, 0.6 and 0.3 % of perplexity on 1,533 tokens; without
`feedback` 75 % cost 5.5 %. Of SmolLM2-135M, with 3 bits in 75 %, a KL of 0.123 and not 0.150, 13.9 % and not 15.9."""

LENGTH = 512
FIT, JUDGED = 11, 3
"""Tokens of a text, texts errors are weighed on, and others that judge the result. With four times as many tokens
as inputs `feedback` takes 22 to 32 % off the outputs' error on other text, with a third of that 11 to 20 %: layers 5,
13 and 21 of Qwen2.5-Coder-1.5B."""

LEAST = np.float32(1e-3)
"""How much an error counts at least, in parts of the mean."""

TOKENS = 256
"""Of the first text, on which the groups' errors are compared."""

ROWS = 32
"""Tokens whose logits are compared together, each as often as there are tries: of a large vocabulary megabytes."""


@dataclass(frozen=True)
class Narrowing:
    """What the user allows."""

    max_loss: float  # of perplexity, in parts of it
    text: str | None = None  # like that which the model will meet; None: what ships with flashd


@dataclass(frozen=True)
class Weigh:
    """How much errors of a layer's weights count, by what each is multiplied by.

    None counts nothing: what a text did not use another may.
    """

    inputs: Floats  # [H, H], the factor of `feedback`: of all layers of Qwen2.5-Coder-1.5B 264 MB
    neurons: Floats  # [F], the mean squares

    @classmethod
    def of(cls, seen: Seen) -> Weigh:
        inputs, neurons = (np.square(values).mean(0) for values in (seen.h, seen.a))
        return cls(factor(seen.h, _counting(inputs)), _counting(neurons))


def _counting(means: Floats) -> Floats:
    return np.asarray(means + LEAST * means.mean() + np.float32(1e-30), np.float32)


@dataclass(frozen=True)
class Starts:
    """From which group on a layer has 3, and 2 bits."""

    int3: int
    int2: int


@dataclass(frozen=True)
class Judgement:
    """What the other weights do to a text, beside the exact ones."""

    perplexity_exact: float
    perplexity: float
    divergence: float  # nats

    @property
    def loss(self) -> float:
        return self.perplexity / self.perplexity_exact - 1


def cut(tokenizer_json: bytes, text: str | None, context: int) -> tuple[list[Numbers], list[Numbers]]:
    """Texts to weigh on and texts to judge by, in turn from all over `text`, or, if None, what ships with flashd.

    Raises DataError for a short one.
    """
    tokens = text_tokens(tokenizer_json, "".join(_own_text()) if text is None else text)
    length, wanted = min(context, LENGTH), FIT + JUDGED
    texts = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    if len(texts) < wanted:
        raise DataError(
            f"to measure a loss takes {wanted * length} tokens of sample text and the text has {len(tokens)}; give a"
            " longer one with --text"
        )
    spread = [texts[at * len(texts) // wanted] for at in range(wanted)]
    judged = set(range(2, 4 * JUDGED, 4))
    return [t for i, t in enumerate(spread) if i not in judged], [spread[i] for i in sorted(judged)]


def _own_text(folder: Traversable | None = None) -> Iterator[str]:
    """The sample text and flashd's own modules: prose and code that the package has anyway."""
    if folder is None:
        yield files("flashd.pack").joinpath("sample.txt").read_text("utf-8")
        folder = files("flashd")
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _own_text(entry)
        elif entry.name.endswith(".py"):
            yield entry.read_text("utf-8")


def floats(groups: QuantGroups) -> Dense:
    """Groups of 4 bits as matrices."""
    n, _, m, width = groups.q.shape
    parts: list[Any] = [groups.q, groups.scale, groups.centre, groups.step]
    rows = dequantise(QuantRows(*(p.reshape(n * BLOCK * m, -1) for p in parts)), "int4").reshape(n * BLOCK, m, -1)
    top = groups.down_step.astype(np.float32) * unit_steps("int4")[:, None]  # [n, 2, H / 32]
    scale, centre = (
        (codes * np.repeat(top[:, k], BLOCK, axis=1))[:, None]
        for k, codes in enumerate((groups.down_scale, groups.down_centre))
    )  # [n, 1, H]
    down = (unpack(groups.down, 4).astype(np.float32) - 8) * scale + centre  # [n, 32, H]
    biases = groups.bias.reshape(n * BLOCK, -1)
    return Dense([rows[:, k] for k in range(m)], biases, down.reshape(n * BLOCK, 2 * width).T)


def joined(parts: Sequence[Dense]) -> Dense:
    """The neurons of all parts, one behind the other."""
    return Dense(
        [np.concatenate(inputs) for inputs in zip(*(part.inputs for part in parts), strict=True)],
        np.concatenate([part.biases for part in parts]),
        np.concatenate([part.down for part in parts], axis=1),
    )


def group_errors(calibration: Calibration, seen: Seen, exact: Dense, narrow: Dense) -> Floats:
    """[groups]: the squared error of each group's share in the output, in parts of the hidden states' squares.

    Where a norm follows the FFN both are of another size than what is added: the same for all groups of a layer.
    """
    h = seen.h[:TOKENS]
    size = float(np.square(calibration.states[:TOKENS]).sum())
    a, b = calibration.activate(exact, h), calibration.activate(narrow, h)  # [N, F]
    out = np.empty(a.shape[1] // BLOCK, np.float32)
    for g in range(len(out)):
        part = slice(g * BLOCK, (g + 1) * BLOCK)
        out[g] = np.square(a[:, part] @ exact.down[:, part].T - b[:, part] @ narrow.down[:, part].T).sum() / size
    return out


def starts(int3: Floats, int2: Floats, budget: ErrorBudget) -> Starts:
    """The most narrow groups whose errors stay within the budget, from each group's error with 3 and 2 bits.

    The errors [groups] are those of the coldest groups, the layer's last.
    """
    from_2 = _last(int2, budget.int2)
    return Starts(_last(int3[:from_2], budget.int3), from_2)


def _last(errors: Floats, budget: float) -> int:
    """From which on the errors sum up to no more than the budget."""
    behind = np.cumsum(errors[::-1], dtype=np.float64)
    return len(errors) - int(np.searchsorted(behind, budget, side="right"))


def judge(exact: Calibration, others: Sequence[Calibration]) -> list[Judgement]:
    """What each of the others, behind its last layer, makes of the texts of `exact`."""
    lost, divergence, counted = np.zeros(len(others) + 1), np.zeros(len(others)), 0
    for rows, following in exact.pieces(ROWS):
        right = np.arange(len(following))
        # the head's weights are read once for all
        h = np.concatenate([each.finished(rows) for each in (exact, *others)])
        logits = np.split(exact.head(h), len(others) + 1)
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


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), np.float32)
