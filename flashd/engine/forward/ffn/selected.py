"""FFNs of which few neurons take part in a token. A window in RAM holds some neurons, the card gives the others.

A predictor says which neurons take part ("LLM in a flash", section 3), or the gate rows do, if they stay in RAM. A
gate is exact if the activation has zeros (CATS, arXiv 2404.08763). In a mixture a router first chooses experts, then
a predictor chooses among their neurons. The choice depends on the token alone and not on what the window holds, so
the same prompt gives the same text, whatever was asked before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward import products, stages
from flashd.engine.forward.ffn.router import Router
from flashd.engine.model import sizes
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.model.distinct import distinct
from flashd.engine.paging.card import CardPicks, gap_bytes
from flashd.engine.paging.card_speed import remembered
from flashd.engine.paging.eviction import Frequency, Mask, Numbers, Policy, kept
from flashd.engine.paging.window import Ids, Window
from flashd.engine.planning.plan import Plan
from flashd.graphs.in_place import graph

OnChosen = Callable[[int, Mask], None]
"""Called with (layer, [T, F] bool: which neurons take part in each token), to record a trace."""

LEAST_GAP = 4096
"""Bytes. Gaps up to this are always read, so that neurons that share a page are one read."""


def ignore(layer: int, chosen: Mask) -> None:
    """An OnChosen that does nothing."""


class Chooser(Protocol):
    """Says which neurons of each layer take part in a token."""

    def load(self, layer: int) -> None:
        """Reads what it needs for `layer`. It is called in order. Raises DamagedRun, CardError."""

    def __call__(self, layer: int, h: Floats, expert: int = 0) -> Mask | Floats:
        """h [T, H] -> [T, F]: the weight of each neuron of an expert, or of the whole FFN. 0: it takes no part."""


class Gate:
    """The Chooser of gate rows in RAM. A neuron takes part if the size of its gate's activation is above its floor.

    Its weight is that activation.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._neurons = bundle, bundle.header.model.expert_neurons
        self._kind = bundle.header.formats.ffn
        self._linear = products.Linear(graph(bundle.header, f"linear.{self._kind}"), self._kind)
        self._activate = stages.Stage(graph(bundle.header, "gate"))
        self._parts: list[tuple[Any, Floats]] = []  # with Rows

    def load(self, layer: int) -> None:
        at = f"layer.{layer}."
        self._parts.append((self._bundle.rows(f"{at}gate"), self._bundle.floats(f"{at}floors")))

    def __call__(self, layer: int, h: Floats, expert: int = 0) -> Floats:
        """h [T, H] -> [T, F]: the gate's activations of the neurons that take part, else 0."""
        rows, floors = self._parts[layer]
        part = slice(expert * self._neurons, (expert + 1) * self._neurons)
        (a,) = self._activate({}, products=self._linear(h, rows[part]))  # [T, F]
        return np.where(np.abs(a) > floors[part], a, np.float32(0))


class Predictor:
    """The Chooser of a low-rank predictor ("LLM in a flash", section 3.1): two thin matrices and a bias a layer.

    A layer of experts has one predictor an expert. The rank may differ from layer to layer; a layer of rank 0 has no
    predictor, and all of its neurons take part.
    """

    def __init__(self, bundle: Bundle) -> None:
        selection = bundle.header.selection
        assert selection is not None
        self._bundle, self._selection = bundle, selection
        self._neurons = bundle.header.model.expert_neurons
        self._linear = products.Linear(graph(bundle.header, "linear.int8"), "int8")
        self._parts: list[tuple[Any, Any, Floats] | None] = []  # with two Rows

    def load(self, layer: int) -> None:
        at = f"layer.{layer}."
        if self._selection.ranks[layer] == 0:
            self._parts.append(None)
            return
        rows = self._bundle.rows
        self._parts.append((rows(f"{at}narrow"), rows(f"{at}wide"), self._bundle.floats(f"{at}lean")))

    def __call__(self, layer: int, h: Floats, expert: int = 0) -> Mask:
        """h [T, H] -> [T, F] bool: which neurons of an expert, or of the whole FFN, take part."""
        parts, neurons = self._parts[layer], self._neurons
        if parts is None:
            return np.ones((len(h), neurons), np.bool_)
        to_rank, from_rank, lean = parts
        rank, at = self._selection.ranks[layer], slice(expert * neurons, (expert + 1) * neurons)
        inner = self._linear(h, to_rank[expert * rank : (expert + 1) * rank])  # [T, rank]
        scores = self._linear(inner, from_rank[at]) + lean[at]  # [T, F]
        return np.asarray(scores > self._selection.thresholds[layer])


class SelectedFfn:
    """The FeedForward of a bundle with a selection.

    Args:
        policy: makes the eviction policy of a layer from how often each of its neurons takes part, [F].
        gap: unwanted bytes that are read rather than skipped. None: what the card was measured to need.
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
    def shares_reads(self) -> bool:
        return False  # each token needs neurons of its own

    @property
    def drafts(self) -> bool:
        return False

    def enter(self, layer: int, x: Floats) -> None:
        """Asks the router, if it takes a layer's input. The chooser has to wait for the FFN's own input."""
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
        chosen = counts != 0  # [T, F]
        self._on_chosen(layer, chosen)
        needed, here = chosen.any(0), window.here()  # [F] each
        found, missing = (np.flatnonzero(part).astype(np.int32) for part in (needed & here, needed & ~here))
        self._needed += len(found) + len(missing)
        self._found += len(found)
        y = self._from_window(layer, h, counts, found)  # [T, H]
        for mask in chosen:
            self._policies[layer].used(mask)
        keep = kept(self._policies[layer], needed | here, window.capacity)  # [F]
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
        """[T, F]: the weight of each neuron in each token; 0 if it takes no part.

        In a mixture it is multiplied by the weight of the neuron's expert.
        """
        if self._router is None:
            return self._choose(layer, h)
        if not self._router.early:
            self._routed = self._router(layer, h)
        assert self._routed is not None
        used, weights = self._routed
        counts = np.zeros((len(h), self._model.ffns, self._model.expert_neurons), np.float32)
        for expert in distinct(used).tolist():
            tokens, place = np.nonzero(used == expert)  # [n] each
            counts[tokens, expert] = weights[tokens, place, None] * self._choose(layer, h[tokens], expert)
        return counts.reshape(len(h), -1)

    def from_ram(self, layer: int, h: Floats) -> Floats:
        """Not supported: a pass needs few neurons as it is."""
        raise NotImplementedError

    def _from_window(self, layer: int, h: Floats, counts: Mask | Floats, found: Ids) -> Floats:
        """[T, H]: the contribution of neurons `found` [n], which are in the window, some at a time."""
        y = np.zeros(h.shape, np.float32)
        for at in range(0, len(found), self._at_once):
            part = found[at : at + self._at_once]
            y += self._product(h, self._windows[layer].rows_of(part), counts[:, part])
        return y

    def lend(self, nbytes: int) -> None:
        """Borrows nothing: the windows are as large as the plan says."""

    def restart(self) -> None:
        """Does nothing: a window that a broken pass left with fewer neurons still knows which it holds."""

    def close(self) -> None:
        self._picks.close()
