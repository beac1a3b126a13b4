"""FFNs of which few neurons take part in a token: a predictor says which, a window keeps them, the card has the rest.

Section 3 of "LLM in a flash". What takes part depends on the token alone and not on what the window holds, so that
the same prompt gives the same text whatever was asked before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.rows import Floats, Rows
from flashd.engine import graph
from flashd.engine.card import CardPicks, CardStats, gap_bytes
from flashd.engine.cardspeed import remembered
from flashd.engine.ffn import OnStep
from flashd.engine.plan import Plan
from flashd.engine.policy import Frequency, Mask, Policy, kept
from flashd.engine.window import Ids, Window

OnChosen = Callable[[int, Mask], None]
"""Called with (layer, which neurons take part in each token [T, F]), to record a trace."""

LEAST_GAP = 4096
"""Neurons that share a page are one read."""


def ignore(layer: int, chosen: Mask) -> None:
    """An OnChosen that does nothing."""


class Predictor:
    """Tells which neurons of each layer take part, from what goes into its FFN."""

    def __init__(self, bundle: Bundle) -> None:
        selection = bundle.header.selection
        assert selection is not None
        self._bundle, self._selection = bundle, selection
        self._neurons = bundle.header.model.neurons
        self._linear = graph.Linear(bundle.read("graph.linear.int8"))
        self._parts: list[tuple[Rows, Rows, Floats] | None] = []

    def load(self, layer: int) -> None:
        """Reads a layer's, in order. Raises DamagedRun, CardError."""
        at = f"layer.{layer}."
        if self._selection.ranks[layer] == 0:
            self._parts.append(None)
            return
        rows = self._bundle.rows
        self._parts.append((rows(f"{at}narrow"), rows(f"{at}wide"), self._bundle.floats(f"{at}lean")))

    def __call__(self, layer: int, h: Floats) -> Mask:
        """[T, F]: which neurons take part, for h [T, H]."""
        parts = self._parts[layer]
        if parts is None:
            return np.ones((len(h), self._neurons), np.bool_)
        narrow, wide, lean = parts
        scores = self._linear(self._linear(h, narrow), wide) + lean
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
        self._product = graph.Neurons(bundle.read("graph.ffn"), self._model)
        self._predict = Predictor(bundle)
        self._rates = bundle.floats("rates").reshape(self._model.layers, -1)
        self._policies = [policy(rates) for rates in self._rates]
        self._windows: list[Window] = []
        gap = gap_bytes(remembered(bundle.path)) if gap is None else gap
        self._picks = CardPicks(bundle, max(gap, LEAST_GAP), plan.buffers)
        self._at_once = max(1, graph.TEMPORARY_BYTES // self._form.nbytes)
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
        """The predictor is asked when the FFN's own input is there."""

    def load(self, layer: int) -> None:
        self._predict.load(layer)
        window = Window(self._form, self._model.neurons, self._plan.slots[layer])
        self._windows.append(window)
        warm = kept(self._policies[layer], np.ones(self._model.neurons, np.bool_), window.capacity)
        for units, raw in self._picks.take(layer, np.flatnonzero(warm).astype(np.int32)):
            window.put(units, self._form.views(raw))
        if layer == self._model.layers - 1:
            self._picks.forget_counts()

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        chosen, window = self._predict(layer, h), self._windows[layer]
        self._on_chosen(layer, chosen)
        needed, here = chosen.any(0), window.here()
        found, missing = (np.flatnonzero(part).astype(np.int32) for part in (needed & here, needed & ~here))
        self._needed += len(found) + len(missing)
        self._found += len(found)
        y = self._share(layer, h, chosen, found)
        for mask in chosen:
            self._policies[layer].used(mask)
        keep = kept(self._policies[layer], needed | here, window.capacity)
        for unit in np.flatnonzero(here & ~keep).tolist():
            window.delete(unit)
        for units, raw in self._picks.take(layer, missing):
            rows = self._form.views(raw)
            y += self._product(h, rows, chosen[:, units])
            stay = np.flatnonzero(keep[units])
            window.put(units[stay], rows[stay])
            on_step(layer, self._model.layers, self.card.bytes_read)
        return y

    def from_ram(self, layer: int, h: Floats) -> Floats:
        chosen, window = self._predict(layer, h), self._windows[layer]
        return self._share(layer, h, chosen, np.flatnonzero(chosen.any(0) & window.here()).astype(np.int32))

    def _share(self, layer: int, h: Floats, chosen: Mask, found: Ids) -> Floats:
        """The share of neurons that are in the window, some at a time."""
        y = np.zeros(h.shape, np.float32)
        for at in range(0, len(found), self._at_once):
            part = found[at : at + self._at_once]
            y += self._product(h, self._windows[layer].rows_of(part), chosen[:, part])
        return y

    def lend(self, nbytes: int) -> None:
        """Its windows are as large as the plan says."""

    def restart(self) -> None:
        """A layer that broke off has fewer neurons in its window, and they are those that it says."""

    def close(self) -> None:
        self._picks.close()
