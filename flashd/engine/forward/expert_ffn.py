"""FFNs that are mixtures of experts. A pass reads from the card only those experts that its tokens use and RAM lacks.

The routers of all layers stay in RAM, and as many experts of each layer as the plan allows. The answer does not
depend on which experts are in RAM: each is multiplied in the same parts and added in the same order in either case.

While a layer computes, the experts of the next layer are guessed and read ahead: the next layer's router is given the
input of this layer's router, as Eliseev and Mazur do (arXiv 2312.17238, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.arrays import Groups
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Floats
from flashd.engine.forward import products
from flashd.engine.forward.router import Router
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.paging.card import CardQueue, Extent, units_of_a_read
from flashd.engine.paging.eviction import LeastRecentlyUsed, Numbers
from flashd.engine.paging.window import Window
from flashd.engine.planning.plan import Plan

RIGHT_DECAY = 0.9
"""The part of the running share of right guesses that stays when a pass adds its own."""

TRUSTED = 0.5
"""Guesses are read ahead if at least this share was right: a wrong one may keep the card from what is needed."""


@dataclass
class _LayerExperts:
    """The experts of one layer that stay in RAM, and how well they are guessed."""

    window: Window
    recent: LeastRecentlyUsed
    guessed: frozenset[int] = frozenset()  # experts that were guessed before the layer's own router was asked
    right: float = 0.5  # the running share of guesses that were right; it is not known at first


@dataclass(frozen=True)
class _Routed:
    """Which experts the tokens of a pass use in one layer."""

    used: Numbers  # [T, K], numbers of experts
    weights: Floats  # [T, K]
    here: list[int]  # those used that are in the window
    missing: list[int]  # those used that the card has to give


class ExpertFfn:
    """The FeedForward of a mixture: each token uses the experts that the router chooses, each read once a pass."""

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self._bundle, self._plan = bundle, plan
        self._model: Architecture = bundle.header.model
        assert self._model.experts is not None
        self._experts = self._model.experts
        self._size = self._model.expert_groups
        self._form = bundle.header.group
        self._most = units_of_a_read(self._form.nbytes)
        self._product = products.Ffn(bundle.read("graph.ffn"), self._model)
        self._router = Router(bundle)
        self._layers: list[_LayerExperts] = []
        self._passing = Window(self._form, self._model.groups, plan.passing_groups)
        self._queue = CardQueue(bundle, plan.passing_groups, plan.buffers)
        self._routed: _Routed | None = None
        self._needed = self._found = 0

    @property
    def card(self) -> CardStats:
        return self._queue.stats

    @property
    def hit_rate(self) -> float:
        return self._found / self._needed if self._needed else self._plan.pinned_share

    @property
    def shares_reads(self) -> bool:
        return False  # each token uses experts of its own

    @property
    def drafts(self) -> bool:
        return False

    def load(self, layer: int) -> None:
        capacity = self._plan.pinned_groups // self._size
        window = Window(self._form, self._experts.count, capacity, self._size)
        for first, groups in self._bundle.groups(layer, capacity * self._size):
            for extent in self._extents(layer, first, len(groups)):
                at = extent.first - first
                part: Any = groups[at : at + extent.count]
                window.fill(extent.first // self._size, extent.first % self._size, part)
        self._router.load(layer)
        self._layers.append(_LayerExperts(window, LeastRecentlyUsed(self._experts.count)))

    def enter(self, layer: int, x: Floats) -> None:
        if self._experts.early:
            self._choose(layer, x)

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        if not self._experts.early:
            self._choose(layer, h)
        routed, window = self._routed, self._layers[layer].window
        assert routed is not None
        shares = np.zeros((*routed.used.shape, h.shape[1]), np.float32)  # [T, K, H]
        for expert in routed.here:
            for extent in self._reads(layer, expert):
                groups = window.groups_of(expert, extent.first % self._size, extent.count)
                self._add(shares, h, routed, expert, groups)
        stay = self._make_room(layer, routed)
        try:
            for extent, raw in self._queue.take():
                expert, groups = extent.first // self._size, self._form.views(raw)
                if expert in stay:
                    groups = window.fill(expert, extent.first % self._size, groups)
                else:
                    self._passing.insert(extent.first, groups)
                    groups = self._passing.rows
                self._add(shares, h, routed, expert, groups)
                self._passing.clear()
                on_step(layer, self._model.layers, self.card.bytes_read)
        except BaseException:
            # an expert may have come in part
            for expert in routed.missing:
                if expert in window:
                    window.delete(expert)
            raise
        return np.asarray(np.einsum("tk,tkh->th", routed.weights, shares), np.float32)

    def from_ram(self, layer: int, h: Floats) -> Floats:
        """Not supported: a guess without the experts that a token needs would be worth nothing."""
        raise NotImplementedError

    def lend(self, nbytes: int) -> None:
        """Borrows nothing: the windows are as large as the plan says."""

    def restart(self) -> None:
        self._queue.restart()
        self._passing.clear()
        for layer in self._layers:
            layer.guessed = frozenset()

    def close(self) -> None:
        self._queue.close()

    def _choose(self, index: int, routed: Floats) -> None:
        """Asks a layer's router for `routed` [T, H], reads what is missing, then what the next layer may need."""
        layer = self._layers[index]
        used, weights = self._router(index, routed)
        needed = np.unique(used).tolist()
        here = [e for e in needed if e in layer.window]
        missing = [e for e in needed if e not in layer.window]
        self._routed = _Routed(used, weights, here, missing)
        self._needed, self._found = self._needed + len(needed), self._found + len(here)
        layer.recent.use(used)
        if layer.guessed:
            share = len(layer.guessed.intersection(missing)) / len(layer.guessed)
            layer.right = RIGHT_DECAY * layer.right + (1 - RIGHT_DECAY) * share
        self._queue.want([e for expert in missing for e in self._reads(index, expert)])
        if index + 1 < len(self._layers) and self._layers[index + 1].window.used < self._experts.count:
            self._guess(index + 1, routed)

    def _guess(self, index: int, routed: Floats) -> None:
        """Reads ahead the experts that a layer may need, by what its router says to another's input [T, H]."""
        layer = self._layers[index]
        uses = np.bincount(self._router(index, routed)[0].reshape(-1), minlength=self._experts.count)  # [E]
        likely = [e for e in np.argsort(-uses, kind="stable").tolist() if uses[e] and e not in layer.window]
        ahead: list[Extent] = []
        guessed = []
        for expert in likely:
            if len(ahead) >= self._plan.buffers:
                break
            ahead += self._reads(index, expert)
            guessed.append(expert)
        layer.guessed = frozenset(guessed)
        if layer.right >= TRUSTED:
            self._queue.guess(ahead[: self._plan.buffers])

    def _make_room(self, index: int, routed: _Routed) -> set[int]:
        """Evicts the experts used longest ago. Returns those that are in the window once the missing have come."""
        layer = self._layers[index]
        both = np.concatenate([layer.window.units, np.array(routed.missing, np.int64)])  # [n]
        stay = set(layer.recent.worth(both, layer.window.capacity).tolist())
        for expert in set(layer.window.units.tolist()) - stay:
            layer.window.delete(expert)
        return stay

    def _add(self, shares: Floats, h: Floats, routed: _Routed, expert: int, groups: Groups) -> None:
        """Adds what some groups of an expert contribute to the tokens that use it. shares: [T, K, H]."""
        tokens, place = np.nonzero(routed.used == expert)  # [n] each
        shares[tokens, place] += self._product(h[tokens], groups)

    def _reads(self, layer: int, expert: int) -> list[Extent]:
        """The reads that fetch an expert."""
        return self._extents(layer, expert * self._size, self._size)

    def _extents(self, layer: int, first: int, n: int) -> list[Extent]:
        """The reads of groups first to first + n - 1 of a layer. None crosses the end of an expert."""
        out, stop = [], first + n
        while first < stop:
            expert, at = divmod(first, self._size)
            end = min(expert * self._size + min(self._size, (at // self._most + 1) * self._most), stop)
            out.append(Extent(layer, first, end - first))
            first = end
        return out
