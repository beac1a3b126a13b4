"""The FFN layers of a model that does not fit: what of them stays in RAM and what comes from the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashd.bundle.header import Header
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import GroupFormat
from flashd.bundle.rows.kinds import Bytes, Floats
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.model.sizes import TOKENS_AT_ONCE
from flashd.engine.paging.card import CardStream, Extent, extents
from flashd.engine.planning.plan import Plan
from flashd.system.freed_memory import give_back_freed_memory


def stream_past(
    header: Header, here: tuple[int, ...], head_rows: int, to_stay: tuple[int, ...] | None = None
) -> list[Extent]:
    """What a pass that needs everything finds on the card: the groups that are not here, then rows of the head.

    Args:
        here: of each layer, so many first groups are in RAM.
        to_stay: of each layer, so many first groups will be. Those that come are read one by one, so that each can
            stay, and go again, by itself. None: as many as are here.
    """
    schedule = []
    for section, part in enumerate(header.ffn_sections):
        first, later = (
            min(max(groups[part.layer] - part.first, 0), part.count) for groups in (here, to_stay or here)
        )
        schedule += [Extent(section, group, 1) for group in range(first, later)]
        schedule += extents(section, range(max(first, later), part.count), part.form.nbytes)
    runs = range(-(-head_rows // ROWS_OF_A_RUN), -(-header.model.vocabulary // ROWS_OF_A_RUN))
    return schedule + extents(len(header.ffn_sections), runs, ROWS_OF_A_RUN * header.row_format("head").nbytes)


@dataclass(frozen=True)
class _Pinned:
    """Groups of a layer that stay in RAM."""

    session: Any
    groups: int


class StreamedFfn:
    """Every neuron takes part: the hottest groups are pinned, the others stream past once for a pass.

    While memory is lent, the first of those that stream past stay until it is wanted back. Behind the layers the
    head's unlikely rows stream past too, see forward.head. The shares of groups are added in the groups' order, so
    that the sum is the same whatever is in RAM.
    """

    def __init__(self, bundle: Bundle, constants: Constants, plan: Plan) -> None:
        self._bundle, self._constants, self._plan = bundle, constants, plan
        self._model = bundle.header.model
        self._forms: list[GroupFormat] = [part.form for part in bundle.header.ffn_sections]
        self._sections = [
            [number for number, part in enumerate(bundle.header.ffn_sections) if part.layer == layer]
            for layer in range(self._model.layers)
        ]
        self._pinned: list[list[_Pinned]] = []  # of each layer, its first groups, in order
        self._goal = plan.pinned
        self._scheduled = plan.pinned, plan.pinned
        self.stream = CardStream(
            bundle, stream_past(bundle.header, plan.pinned, plan.head_rows), plan.buffers, self._session
        )
        self._needed = self._found = 0

    @property
    def card(self) -> CardStats:
        return self.stream.stats

    @property
    def hit_rate(self) -> float:
        return self._found / self._needed if self._needed else self._plan.pinned_share

    @property
    def shares_reads(self) -> bool:
        return self._here != self._model.layer_groups or self._plan.head_rows < self._model.vocabulary

    @property
    def drafts(self) -> bool:
        groups = zip(self._here, self._model.layer_groups, strict=True)
        return self.shares_reads and all(here or not every for here, every in groups)

    @property
    def _here(self) -> tuple[int, ...]:
        """Of each layer, the groups that are in RAM: its first ones."""
        return tuple(sum(part.groups for part in pinned) for pinned in self._pinned)

    def load(self, layer: int) -> None:
        count = self._plan.pinned[layer]
        parts = self._bundle.groups(layer, count, at_once=max(count, 1))
        self._pinned.append([_Pinned(self._constants.groups(groups), len(groups)) for _, groups in parts])
        if len(self._pinned) == self._model.layers:
            self._settle()
            self.stream.read_ahead()

    def enter(self, layer: int, x: Floats) -> None:
        """Every group is needed, whatever comes."""

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        if layer == 0:
            self._settle()
        y = self.from_ram(layer, h)  # [T, H]
        pinned, here = self._pinned[layer], self._here[layer]
        self._found += here
        self._needed += self._model.layer_groups[layer]
        for section in self._sections[layer]:
            first = self._bundle.header.ffn_sections[section].first
            for extent, session in self.stream.section(section):
                y = _added(session, h, y)
                if first + extent.first == here and here + extent.count <= self._goal[layer]:
                    pinned.append(_Pinned(session, extent.count))
                    here += extent.count
                on_step(layer, self._model.layers, self.card.bytes_read)
        return y

    def from_ram(self, layer: int, h: Floats) -> Floats:
        y = np.zeros((len(h), self._model.share_width), np.float32)
        for pinned in self._pinned[layer]:
            y = _added(pinned.session, h, y)
        return y

    def lend(self, nbytes: int) -> None:
        """Fewer groups are let go at once; more stay when they next stream past."""
        self._goal = self._plan.pinned_beside(nbytes)
        before = self._here
        for pinned, goal, here in zip(self._pinned, self._goal, before, strict=False):
            while here > goal:
                here -= pinned.pop().groups
        if self._here != before:
            give_back_freed_memory()  # else it would be kept for other sessions, and not for the KV cache

    def _settle(self) -> None:
        """Has the card give what no longer is in RAM, and no more what now is."""
        here, goal = self._here, self._goal
        if (here, goal) != self._scheduled:
            self.stream.restart(stream_past(self._bundle.header, here, self._plan.head_rows, goal))
            self._scheduled = here, goal

    def _session(self, extent: Extent, raw: Bytes) -> Any:
        """A session of what was read, groups or rows of the head; called in the thread that read it."""
        if extent.section < len(self._forms):
            return self._constants.groups(self._forms[extent.section].groups(raw), once=True)
        form = self._bundle.header.row_format("head")
        return self._constants.rows(form.views(raw), form.width, once=True)

    def restart(self) -> None:
        self.stream.restart()

    def close(self) -> None:
        self.stream.close()


def _added(session: Any, h: Floats, y: Floats) -> Floats:
    """y [T, width] and the share of some groups in the output for h [T, H], TOKENS_AT_ONCE tokens at a time."""
    starts = range(0, len(h), TOKENS_AT_ONCE)
    parts = [multiplied(session, h=h[at : at + TOKENS_AT_ONCE], before=y[at : at + TOKENS_AT_ONCE]) for at in starts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
