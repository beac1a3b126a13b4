"""FFNs of which few neurons take part in a token: a predictor says which, a window keeps them, the card has the rest.

Section 3 of "LLM in a flash". In a mixture a router chooses experts first, and predictors among their neurons. Where
gate rows stay in RAM they say which, exactly where the activation has zeros (CATS, arXiv 2404.08763). What takes part
depends on the token alone and not on what the window holds, so that the same prompt gives the same text whatever was
asked before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Floats
from flashd.engine.forward import products, stages
from flashd.engine.forward.router import Router
from flashd.engine.model import sizes
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.paging.card import CardPicks, gap_bytes
from flashd.engine.paging.card_speed import remembered
from flashd.engine.paging.eviction import Frequency, Mask, Numbers, Policy, kept
from flashd.engine.paging.window import Ids, Window
from flashd.engine.planning.plan import Plan
from flashd.graphs.in_place import graph

OnChosen = Callable[[int, Mask], None]
"""Called with (layer, which neurons take part in each token [T, F]), to record a trace."""

LEAST_GAP = 4096
"""Neurons that share a page are one read."""


def ignore(layer: int, chosen: Mask) -> None:
    """An OnChosen that does nothing."""


class Chooser(Protocol):
    """What says which neurons of each layer take part in a token."""

    def load(self, layer: int) -> None:
        """Reads a layer's, in order. Raises DamagedRun, CardError."""

    def __call__(self, layer: int, h: Floats, expert: int = 0) -> Mask | Floats:
        """[T, F]: what the neurons of an expert, or of the whole FFN, count for with h [T, H]; 0 of no part in it."""


class Gate:
    """Gate rows that stay in RAM: a neuron counts for its gate's activation, if that in size is above its floor."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._neurons = bundle, bundle.header.model.expert_neurons
        self._kind = bundle.header.formats.ffn
        self._linear = products.Linear(graph(bundle.header, f"linear.{self._kind}"), self._kind)
        self._activate = stages.Stage(graph(bundle.header, "gate"))
        self._parts: list[tuple[Any, Floats]] = []  # with Rows

    def load(self, layer: int) -> None:
        """Reads a layer's, in order. Raises DamagedRun, CardError."""
        at = f"layer.{layer}."
        self._parts.append((self._bundle.rows(f"{at}gate"), self._bundle.floats(f"{at}floors")))

    def __call__(self, layer: int, h: Floats, expert: int = 0) -> Floats:
        """[T, F]: the activations of those that take part, else 0."""
        rows, floors = self._parts[layer]
        part = slice(expert * self._neurons, (expert + 1) * self._neurons)
        (a,) = self._activate({}, products=self._linear(h, rows[part]))
        return np.where(np.abs(a) > floors[part], a, np.float32(0))


class Predictor:
    """Tells which neurons of each layer take part, from what goes into its FFN, or into one of its experts."""

    def __init__(self, bundle: Bundle) -> None:
        selection = bundle.header.selection
        assert selection is not None
        self._bundle, self._selection = bundle, selection
        self._neurons = bundle.header.model.expert_neurons
        self._linear = products.Linear(graph(bundle.header, "linear.int8"), "int8")
        self._parts: list[tuple[Any, Any, Floats] | None] = []  # with two Rows

    def load(self, layer: int) -> None:
        """Reads a layer's, in order. Raises DamagedRun, CardError."""
        at = f"layer.{layer}."
        if self._selection.ranks[layer] == 0:
            self._parts.append(None)
            return
        rows = self._bundle.rows
        self._parts.append((rows(f"{at}narrow"), rows(f"{at}wide"), self._bundle.floats(f"{at}lean")))

    def __call__(self, layer: int, h: Floats, expert: int = 0) -> Mask:
        """[T, F]: which neurons of an expert, or of the whole FFN, take part for h [T, H]."""
        parts, neurons = self._parts[layer], self._neurons
        if parts is None:
            return np.ones((len(h), neurons), np.bool_)
        narrow, wide, lean = parts
        rank, at = self._selection.ranks[layer], slice(expert * neurons, (expert + 1) * neurons)
        inner = self._linear(h, narrow[expert * rank : (expert + 1) * rank])
        scores = self._linear(inner, wide[at]) + lean[at]
        return np.asarray(scores > self._selection.thresholds[layer])


class SelectedFfn:
    """The FeedForward of a bundle with a selection.

    Args:
        policy: makes a layer's policy from how often its neurons take part [F].
        gap: unwanted bytes that are read rather than skipped; None: as the card was measured.
        on_chosen: is told which neurons take part.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        policy: Callable[[Floats], Policy] = Frequency,
        gap: int | None = None,
        on_chosen: OnChosen = ignore,
    ) -> None:
        self._bundle, self._plan, self._on_chosen = bundle, plan, on_chosen
        self._model, self._form = bundle.header.model, bundle.header.neuron
        self._product = products.Neurons(
            graph(bundle.header, "neurons"), self._form.inputs, bundle.header.formats.ffn
        )
        self._choose: Chooser = Gate(bundle) if bundle.header.gate_decides else Predictor(bundle)
        self._router = Router(bundle) if self._model.experts else None
        self._routed: tuple[Numbers, Floats] | None = None
        self._rates = bundle.floats("rates").reshape(self._model.layers, -1)
        self._policies = [policy(rates) for rates in self._rates]
        self._windows: list[Window] = []
        gap = gap_bytes(remembered(bundle.path)) if gap is None else gap
        self._picks = CardPicks(bundle, max(gap, LEAST_GAP), plan.buffers)
        self._at_once = max(1, sizes.TEMPORARY_BYTES // self._form.nbytes)
        self._needed = self._found = 0

    @property
    def card(self) -> CardStats:
        return self._picks.stats

    @property
    def hit_rate(self) -> float:
        return self._found / self._needed if self._needed else 0.0

    @property
    def pages(self) -> bool:
        return False  # each further token of a pass needs neurons of its own

    @property
    def drafts(self) -> bool:
        return False

    def enter(self, layer: int, x: Floats) -> None:
        """A router may be asked already, the chooser when the FFN's own input is there."""
        if self._router and self._router.early:
            self._routed = self._router(layer, x)

    def load(self, layer: int) -> None:
        self._choose.load(layer)
        if self._router:
            self._router.load(layer)
        window = Window(self._form, self._model.neurons, self._plan.slots[layer])
        self._windows.append(window)
        warm = kept(self._policies[layer], np.ones(self._model.neurons, np.bool_), window.capacity)
        for units, raw in self._picks.take(layer, np.flatnonzero(warm).astype(np.int32)):
            window.put(units, self._form.views(raw))
        if layer == self._model.layers - 1:
            self._picks.forget_counts()

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        counts, window = self._counts(layer, h), self._windows[layer]
        chosen = counts != 0
        self._on_chosen(layer, chosen)
        needed, here = chosen.any(0), window.here()
        found, missing = (np.flatnonzero(part).astype(np.int32) for part in (needed & here, needed & ~here))
        self._needed += len(found) + len(missing)
        self._found += len(found)
        y = self._from_window(layer, h, counts, found)
        for mask in chosen:
            self._policies[layer].used(mask)
        keep = kept(self._policies[layer], needed | here, window.capacity)
        for unit in np.flatnonzero(here & ~keep).tolist():
            window.delete(unit)
        for units, raw in self._picks.take(layer, missing):
            rows = self._form.views(raw)
            y += self._product(h, rows, counts[:, units])
            stay = np.flatnonzero(keep[units])
            window.put(units[stay], rows[stay])
            on_step(layer, self._model.layers, self.card.bytes_read)
        return y

    def _counts(self, layer: int, h: Floats) -> Mask | Floats:
        """[T, F]: what each neuron's share counts for in a token, the weight of its expert; 0 without part in it."""
        if self._router is None:
            return self._choose(layer, h)
        if not self._router.early:
            self._routed = self._router(layer, h)
        assert self._routed is not None
        used, weights = self._routed
        counts = np.zeros((len(h), self._model.ffns, self._model.expert_neurons), np.float32)
        for expert in np.unique(used).tolist():
            tokens, place = np.nonzero(used == expert)
            counts[tokens, expert] = weights[tokens, place, None] * self._choose(layer, h[tokens], expert)
        return counts.reshape(len(h), -1)

    def from_ram(self, layer: int, h: Floats) -> Floats:
        """Never asked for: a pass needs few neurons as it is."""
        raise NotImplementedError

    def _from_window(self, layer: int, h: Floats, counts: Mask | Floats, found: Ids) -> Floats:
        """The share of neurons that are in the window, some at a time."""
        y = np.zeros(h.shape, np.float32)
        for at in range(0, len(found), self._at_once):
            part = found[at : at + self._at_once]
            y += self._product(h, self._windows[layer].rows_of(part), counts[:, part])
        return y

    def lend(self, nbytes: int) -> None:
        """Its windows are as large as the plan says."""

    def restart(self) -> None:
        """A layer that broke off has fewer neurons in its window, and they are those that it says."""

    def close(self) -> None:
        self._picks.close()
