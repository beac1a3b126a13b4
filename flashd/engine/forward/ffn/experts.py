"""FFNs that are mixtures of experts. A pass reads from the card only those experts that its tokens use and RAM lacks.

The routers of all layers stay in RAM, and as many experts of each layer as the plan allows, as the card has them: to
open a session of an expert takes longer than the few products that it has before it goes. The answer does not depend
on which experts are in RAM: each is multiplied in the same parts and added in the same order in either case. Only if
there is room for sessions of all of them, they are sessions.

While a layer computes, the experts of the next layer are guessed and read ahead: the next layer's router is given the
input of this layer's router, as Eliseev and Mazur do (arXiv 2312.17238, section 3.2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.arrays import Groups
from flashd.bundle.layer_kinds import LeadingFfn
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import Bytes, Floats
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.ffn.router import Router
from flashd.engine.forward.kept import Kept, Shelf
from flashd.engine.forward.unpacked import Entering, Multiplier
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.model.sizes import AT_WORK, TOKENS_AT_ONCE, at_work
from flashd.engine.paging.card import CardQueue, Extent, units_of_a_read
from flashd.engine.paging.card_speed import IN_FLIGHT, remembered
from flashd.engine.paging.eviction import LeastRecentlyUsed, Numbers
from flashd.engine.planning.plan import Plan
from flashd.graphs.constant import Arithmetic

RIGHT_DECAY = 0.9
"""The part of the running share of right guesses that stays when a pass adds its own."""

TRUSTED = 0.5
"""Guesses are read ahead if at least this share was right: a wrong one may keep the card from what is needed."""

LOOKS_AGAIN = 4
"""Passes after which a layer that is not trusted is guessed again, only to see whether that is right by now."""


@dataclass
class _LayerExperts:
    """The experts of one layer that stay in RAM, and how well they are guessed."""

    kept: dict[int, list[Any]]  # of experts in RAM, their groups in order, or a session of all of them
    recent: LeastRecentlyUsed
    capacity: int  # experts
    guessed: frozenset[int] = frozenset()  # experts, before its router was asked
    right: float = 0.5  # the running share of guesses that are; at first it is not known
    doubted: int = 0  # passes since it was last guessed while too few guesses are right


@dataclass(frozen=True)
class _Routed:
    """Which experts the tokens of a pass use in one layer."""

    asked: Floats  # [T, H], what the router was asked with
    used: Numbers  # [T, K], numbers of experts
    weights: Floats  # [T, K]
    here: list[int]  # those used that are in the window
    missing: list[int]  # those used that the card has to give


@dataclass
class _Work:
    """Experts whose shares some threads compute. No two experts write to the same of shares [T, K, H]."""

    workers: ThreadPoolExecutor | None  # None: all threads compute each product, so one comes after the other
    multiply: Multiplier | _InSessions
    shares: Floats
    entering: Entering
    routed: _Routed
    under_way: deque[Future[None]] = field(default_factory=deque)

    def start(self, expert: int, groups: Sequence[Any]) -> None:
        if self.workers is None:
            self._add(expert, groups)
        else:
            self.under_way.append(self.workers.submit(self._add, expert, groups))

    def wait(self, left: int) -> None:
        """Waits until at most `left` of them are under way."""
        while len(self.under_way) > left:
            self.under_way.popleft().result()

    def _add(self, expert: int, groups: Sequence[Any]) -> None:
        """Adds the share that an expert has in the output of those tokens that use it."""
        tokens, place = np.nonzero(self.routed.used == expert)
        entering = {name: values[tokens] for name, values in self.entering.items()}
        share = self.shares[tokens, place]
        for group in groups:
            share += self.multiply(group, entering)
        self.shares[tokens, place] = share


class _InSessions:
    """Multiplies experts that are the constants of a session each. So they are if all of them fit."""

    def entering(self, form: RowFormat, h: Floats) -> Entering:  # noqa: ARG002
        return {"h": h}

    def __call__(self, session: Any, entering: Entering) -> Floats:
        h = entering["h"]
        return multiplied(session, h=h, before=np.zeros_like(h))


class ExpertFfn:
    """The FeedForward of a mixture: each token uses the experts that the router chooses, each read once a pass."""

    def __init__(self, bundle: Bundle, constants: Constants, plan: Plan) -> None:
        self._bundle, self._constants, self._plan = bundle, constants, plan
        self._model: Architecture = bundle.header.model
        assert self._model.experts is not None
        self._experts = self._model.experts
        self._size = self._model.expert_groups
        self._forms = {layer: bundle.header.group_of(layer) for layer in self._model.paged_layers}
        self._most = units_of_a_read(bundle.header.largest_group.nbytes)
        self._router = Router(bundle)
        self._shelf = Shelf()
        self._multiply = _InSessions() if plan.constant_experts else Multiplier(bundle.header, plan.arithmetic)
        self._layers: dict[int, _LayerExperts] = {}  # of those layers that have experts
        self._first = self._experts.first
        most = min(self._size, self._most)
        speed = remembered(bundle.path)
        depth = speed.depth if speed else IN_FLIGHT
        self._queue = CardQueue(bundle, most if plan.buffers else 0, plan.buffers, self._keep, depth)
        self._workers: ThreadPoolExecutor | None = None
        if not plan.constant_experts:
            self._workers = ThreadPoolExecutor(at_work(plan.threads), thread_name_prefix="experts")
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
        capacity = self._plan.pinned[layer - self._first] // self._size
        kept: dict[int, list[Any]] = {expert: [] for expert in range(capacity)}
        at_once = self._size if self._plan.constant_experts else 1
        for first, groups in self._bundle.groups(layer, capacity * self._size, at_once):
            kept[first // self._size].append(self._kept(layer, groups))
        self._router.load(layer)
        self._layers[layer] = _LayerExperts(kept, LeastRecentlyUsed(self._experts.count), capacity)

    def _kept(self, layer: int, groups: Groups) -> Any:
        if self._plan.constant_experts:
            return self._constants.groups(self._forms[layer].wide(groups))
        return self._shelf.keep(self._forms[layer], groups)

    def _keep(self, extent: Extent, raw: Bytes) -> list[Kept]:
        """The groups that were read. It is called in the thread that read them."""
        form = self._forms[extent.section + self._first]
        return [self._shelf.copy(Kept(form, record)) for record in raw]

    def enter(self, layer: int, x: Floats) -> None:
        if self._experts.early:
            self._choose(layer, x)

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        h, own = h[:, : self._model.hidden], h[:, -self._model.hidden :]  # the same, if the router takes h too
        if not self._experts.early:
            self._choose(layer, own)
        routed, kept = self._routed, self._layers[layer].kept
        assert routed is not None
        shares = self._router.biases(layer, routed.used)  # [T, K, H]
        entering = self._multiply.entering(self._forms[layer].row, h)
        work = _Work(self._workers, self._multiply, shares, entering, routed)
        for expert in routed.here:
            work.start(expert, kept[expert])
        if layer + 1 in self._layers and len(self._layers[layer + 1].kept) < self._experts.count:
            self._guess(layer + 1, routed.asked)
        stay = self._make_room(layer, routed)
        come: dict[int, list[Any]] = {expert: [] for expert in routed.missing}
        for extent, groups in self._queue.take():
            expert = extent.first // self._size
            come[expert] += groups
            if len(come[expert]) == self._size:
                work.wait(AT_WORK)
                work.start(expert, come[expert] if expert in stay else come.pop(expert))
            on_step(layer, self._model.layers, self.card.bytes_read)
        work.wait(0)
        kept |= come
        return np.asarray(np.einsum("tk,tkh->th", routed.weights, shares), np.float32)

    def from_ram(self, layer: int, h: Floats) -> Floats:
        """Not supported: a guess without the experts that a token needs would be worth nothing."""
        raise NotImplementedError

    def lend(self, nbytes: int) -> None:
        """Borrows nothing: the windows are as large as the plan says."""

    def restart(self) -> None:
        self._queue.restart()
        for layer in self._layers.values():
            layer.guessed = frozenset()

    def close(self) -> None:
        self._queue.close()
        if self._workers:
            self._workers.shutdown()

    def _choose(self, index: int, routed: Floats) -> None:
        """Asks a layer's router for `routed` [T, H], and begins to read what is missing."""
        layer = self._layers[index]
        used, weights = self._router(index, routed)
        needed = sorted({*used.reshape(-1).tolist()})
        here = [e for e in needed if e in layer.kept]
        missing = [e for e in needed if e not in layer.kept]
        self._routed = _Routed(routed, used, weights, here, missing)
        self._needed, self._found = self._needed + len(needed), self._found + len(here)
        layer.recent.use(used)
        if layer.guessed:
            share = len(layer.guessed.intersection(missing)) / len(layer.guessed)
            layer.right = RIGHT_DECAY * layer.right + (1 - RIGHT_DECAY) * share
        self._queue.want([e for expert in missing for e in self._reads(index, expert)])

    def _guess(self, index: int, routed: Floats) -> None:
        """Reads ahead the experts that a layer may need, by what its router says to another's input [T, H]."""
        layer = self._layers[index]
        if layer.right < TRUSTED:  # to guess takes a while, and what comes of it would not be read
            layer.doubted = (layer.doubted + 1) % LOOKS_AGAIN
            if layer.doubted:
                layer.guessed = frozenset()
                return
        uses = np.bincount(self._router(index, routed)[0].reshape(-1), minlength=self._experts.count)
        likely = [e for e in np.argsort(-uses, kind="stable").tolist() if uses[e] and e not in layer.kept]
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
        """Takes out what is worth least; returns those that are in RAM when the pass has gone on."""
        layer = self._layers[index]
        if not routed.missing:
            return set(layer.kept)
        both = np.array([*layer.kept, *routed.missing], np.int64)
        stay = set(layer.recent.worth(both, layer.capacity).tolist())
        for expert in layer.kept.keys() - stay:
            del layer.kept[expert]
        return stay

    def _reads(self, layer: int, expert: int) -> list[Extent]:
        """The reads that fetch an expert."""
        return self._extents(layer, expert * self._size, self._size)

    def _extents(self, layer: int, first: int, n: int) -> list[Extent]:
        """The reads of groups first to first + n - 1 of a layer. None crosses the end of an expert."""
        out, stop = [], first + n
        while first < stop:
            expert, at = divmod(first, self._size)
            end = min(expert * self._size + min(self._size, (at // self._most + 1) * self._most), stop)
            out.append(Extent(layer - self._first, first, end - first))
            first = end
        return out


class LeadingFfns:
    """The FFNs of a mixture's first layers, which have no experts. All of them are in RAM."""

    def __init__(self, bundle: Bundle, ffn: LeadingFfn, arithmetic: Arithmetic) -> None:
        self._bundle, self._constants = bundle, Constants(bundle.header.of_leading(ffn), arithmetic)
        self._sessions: dict[int, Any] = {}

    def load(self, layer: int) -> None:
        """Raises DamagedRun, CardError."""
        self._sessions[layer] = self._constants.groups(self._bundle.leading(layer))

    def enter(self, layer: int, x: Floats) -> None:
        """Every neuron is needed, whatever comes."""

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:  # noqa: ARG002
        """h [T, H] -> [T, H]"""
        parts = [h[at : at + TOKENS_AT_ONCE] for at in range(0, len(h), TOKENS_AT_ONCE)]
        session = self._sessions[layer]
        return np.concatenate([multiplied(session, h=part, before=np.zeros_like(part)) for part in parts])


class MixedFfn:
    """The FeedForward of a mixture whose first layers have no experts."""

    def __init__(self, bundle: Bundle, leading: LeadingFfns, experts: ExpertFfn) -> None:
        model = bundle.header.model
        self._experts = experts
        self._of: list[LeadingFfns | ExpertFfn] = [leading] * model.paged_layers.start
        self._of += [experts] * len(model.paged_layers)

    @property
    def card(self) -> CardStats:
        return self._experts.card

    @property
    def hit_rate(self) -> float:
        return self._experts.hit_rate

    @property
    def shares_reads(self) -> bool:
        return self._experts.shares_reads

    @property
    def drafts(self) -> bool:
        return self._experts.drafts

    def load(self, layer: int) -> None:
        self._of[layer].load(layer)

    def enter(self, layer: int, x: Floats) -> None:
        self._of[layer].enter(layer, x)

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        return self._of[layer](layer, h, on_step)

    def from_ram(self, layer: int, h: Floats) -> Floats:
        return self._experts.from_ram(layer, h)

    def lend(self, nbytes: int) -> None:
        self._experts.lend(nbytes)

    def restart(self) -> None:
        self._experts.restart()

    def close(self) -> None:
        self._experts.close()
