"""The search over all layers: how many groups may have fewer bits within a loss of perplexity.

narrow_groups.py has the errors and budgets of one layer. This module tries the budgets on whole models and decides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flashd.bundle.header import Narrowed, group_format
from flashd.bundle.rows.kinds import NARROW, Bytes, Floats, RowKind
from flashd.errors import DataError
from flashd.pack.encode import Encoder
from flashd.pack.lossy import narrow_groups
from flashd.pack.lossy.calibration import Calibration, Dense
from flashd.pack.lossy.narrow_groups import Judgement, Narrowing, Starts, Weigh
from flashd.pack.original import Original
from flashd.pack.weights.matrix import Numbers
from flashd.pack.weights.weights import Ffn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NarrowedLayer:
    """What decides how a layer's groups are ordered and rounded."""

    sizes: Floats  # [F], the sizes of the neurons' contributions to the output
    weigh: Weigh
    starts: Starts | None  # of its narrow groups; None if it has none


@dataclass(frozen=True)
class FewBits:
    """The layers, and what narrowing them costs."""

    layers: list[NarrowedLayer]
    narrowed: Narrowed | None  # None if no group is narrowed


@dataclass
class _Try:
    """One of the budgets that are tried."""

    calibration: Calibration  # of the judging texts, with the groups that the budget narrows
    starts: list[Starts] = field(default_factory=list)  # of each layer so far

    def shares(self, groups: int) -> str:
        """The percentages of all `groups`, of all layers, that have 4, 3 and 2 bits."""
        int3 = 100 * sum(s.int3 for s in self.starts) / groups
        int2 = 100 * sum(s.int2 for s in self.starts) / groups
        return f"{int3:.0f}, {int2 - int3:.0f}, {100 - int2:.0f} %"


def check(original: Original) -> None:
    """Raises DataError for a model whose groups cannot have fewer bits."""
    model = original.model
    if original.formats.ffn != "int4" or model.normed_neurons:
        raise DataError(
            f"{original.path}: only int4 rows can have fewer bits, not those of MXFP4 or BitNet;"
            " pack it without --max-loss"
        )
    if 0 in model.layer_neurons:
        raise DataError(
            f"{original.path}: some layers have no FFN whose groups could have fewer bits; pack it without --max-loss"
        )


def choose(original: Original, tokenizer_json: bytes, narrowing: Narrowing) -> FewBits:
    """The layers whose coldest groups have as few bits as the allowed loss admits, and what that costs.

    Raises DataError for too short a text.
    """
    fit, judged = narrow_groups.cut(tokenizer_json, narrowing.text, original.model.context)
    calibration, exact = original.calibration(fit), original.calibration(judged)
    tries = [_Try(original.calibration(judged)) for _ in narrow_groups.ERROR_BUDGETS]
    seen = [_try_layer(original, i, calibration, exact, tries) for i in range(original.model.layers)]
    found = narrow_groups.judge(exact, [t.calibration for t in tries])
    groups = original.model.layer_groups
    _tell(tries, sum(groups), found)
    narrow = [any(s.int3 < every for s, every in zip(t.starts, groups, strict=True)) for t in tries]
    admitted = narrow_groups.admitted(original.path, narrow, found, narrowing.max_loss)
    if admitted is None:
        return FewBits([NarrowedLayer(sizes, weigh, None) for sizes, weigh in seen], None)
    starts = tries[admitted].starts
    narrowed = narrow_groups.narrowed(starts, judged, found[admitted])
    return FewBits([NarrowedLayer(*each, at) for each, at in zip(seen, starts, strict=True)], narrowed)


def _tell(tries: Sequence[_Try], groups: int, found: Sequence[Judgement]) -> None:
    """Logs what each try came to. `groups`: of all layers."""
    for budget, t, f in zip(narrow_groups.ERROR_BUDGETS, tries, found, strict=True):
        log.info(
            "errors up to %g and %g: groups of 4, 3 and 2 bits %s; perplexity %+.2f %%, KL %.4f",
            budget.int3, budget.int2, t.shares(groups), 100 * f.loss, f.divergence,
        )  # fmt: skip


def _try_layer(
    original: Original, i: int, calibration: Calibration, exact: Calibration, tries: Sequence[_Try]
) -> tuple[Floats, Weigh]:
    """Takes the judging texts through layer `i`: once exact, and with the groups that each budget narrows.

    Returns (the sizes [F] of its neurons' contributions, how much errors of its weights count).
    """
    seen = calibration.layer(i)
    (ffn,), sizes, weigh = original.weights.ffns(i), seen.sizes(), Weigh.of(seen)
    order, kept = Encoder(original.model).order(ffn, sizes), original.model.layer_groups[i] // narrow_groups.KEPT
    n = original.model.group_neurons
    own = dense(ffn, order)
    cold = order[kept * n :]
    thin = {kind: as_floats(original, kind, records(original, ffn, kind, cold, weigh)) for kind in NARROW}
    own_cold = own.part(kept * n, None)
    errors = {kind: narrow_groups.group_errors(calibration, seen, own_cold, thin[kind], n) for kind in NARROW}
    exact.replaced(i, own)
    for t, budget in zip(tries, narrow_groups.ERROR_BUDGETS, strict=True):
        at = narrow_groups.starts(errors["int3"], errors["int2"], budget)
        t.starts.append(Starts(kept + at.int3, kept + at.int2))
        a, b = at.int3 * n, at.int2 * n
        parts = [own.part(0, kept * n + a), thin["int3"].part(a, b), thin["int2"].part(b, None)]
        t.calibration.replaced(i, narrow_groups.joined(parts))
    return sizes, weigh


def dense(ffn: Ffn, order: Numbers) -> Dense:
    """An FFN's exact weights, its neurons in the given order. Neurons that only fill its last block are zero."""
    down, bias, _ = ffn.filled(len(order))
    filling = len(order) - ffn.neurons
    inputs = [np.pad(matrix.rows(slice(None)), ((0, filling), (0, 0)))[order] for matrix in ffn.inputs]
    return Dense(inputs, bias[order], down[:, order])


def records(original: Original, ffn: Ffn, kind: RowKind, order: Numbers, weigh: Weigh) -> Bytes:
    """[groups, bytes] uint8: the neurons `order`, rounded to rows of `kind`."""
    form = replace(group_format(original.model, original.formats), kind=kind)
    chunks = Encoder(original.model).groups(ffn, form, order, weigh)
    return np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, form.nbytes)


def as_floats(original: Original, kind: RowKind, raw: Bytes) -> Dense:
    """What such records stand for."""
    form = replace(group_format(original.model, original.formats), kind=kind)
    return narrow_groups.floats(form.groups(raw), form)
