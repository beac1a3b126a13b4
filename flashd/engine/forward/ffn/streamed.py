"""The FFN layers of a model that does not fit: what of them stays in RAM and what comes from the card."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from flashd.bundle.header import Header
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Bytes, Floats
from flashd.engine.forward.head_rows import UnpackedRows
from flashd.engine.forward.kept import Kept, ScratchOfThread, Shelf
from flashd.engine.forward.unpacked import Multiplier, in_turn
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.model.sizes import TREE_NODES, at_work
from flashd.engine.paging.card import CardStream, Extent, extents
from flashd.engine.planning.plan import Plan
from flashd.engine.planning.unpacked import GUESSED, passing_bytes


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


class StreamedFfn:
    """Every neuron takes part: the hottest groups are pinned, the others stream past once for a pass.

    While memory is lent, by the KV cache or because no prompt is read, the first of those that stream past stay until
    it is wanted back. Behind the layers the head's unlikely rows stream past too, see forward.head. The shares of
    groups are added in the groups' order, so that the sum is the same whatever is in RAM.
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self._bundle, self._plan = bundle, plan
        header = bundle.header
        self._model = header.model
        self._parts = header.ffn_sections
        self._sections = [
            [number for number, part in enumerate(self._parts) if part.layer == layer]
            for layer in range(self._model.layers)
        ]
        self._forms = [header.group_of(layer) for layer in range(self._model.layers)]  # as they are multiplied
        self._shelf, self._passing = Shelf(), Shelf(passing_bytes(header))
        scratch = ScratchOfThread()
        self._multiply = Multiplier(header, plan.arithmetic, scratch)
        # guesses need not be exact, and int8 is faster
        self._guess = self._multiply if plan.arithmetic == GUESSED else Multiplier(header, GUESSED, scratch)
        self._most = at_work(plan.threads)
        self._workers = ThreadPoolExecutor(self._most, thread_name_prefix="groups")
        self._pinned: list[list[Kept]] = []  # of each layer, its first groups, in order
        self._lent, self._of_prompts = 0, 0  # bytes by the KV cache, and by prompts that are not read
        self._goal = plan.pinned
        self._scheduled = plan.pinned, plan.pinned
        schedule = stream_past(header, plan.pinned, plan.head_rows)
        in_turn_of = partial(in_turn, self._workers, most=self._most)
        self.head_rows = UnpackedRows(header.row_format("head"), self._multiply, self._guess, in_turn_of)
        self.stream = CardStream(bundle, schedule, plan.buffers, self._keep, used=self._most)
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
        return tuple(map(len, self._pinned))

    def load(self, layer: int) -> None:
        parts = self._bundle.groups(layer, self._plan.pinned[layer], at_once=1)
        self._pinned.append([self._shelf.keep(self._forms[layer], groups) for _, groups in parts])
        if len(self._pinned) == self._model.layers:
            self._settle()
            self.stream.read_ahead()

    def enter(self, layer: int, x: Floats) -> None:
        """Every group is needed, whatever comes. A prompt takes back the RAM that is lent while none is read."""
        of_prompts = 0 if len(x) > TREE_NODES else self._plan.of_prompts
        if layer == 0 and of_prompts != self._of_prompts:
            self._of_prompts = of_prompts
            self._make_room()

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        if layer == 0:
            self._settle()
        self._found += len(self._pinned[layer])
        self._needed += self._model.layer_groups[layer]
        with closing(self._coming(layer, on_step)) as coming:
            return self._sum(layer, h, chain(self._pinned[layer][:], coming), self._multiply)

    def from_ram(self, layer: int, h: Floats) -> Floats:
        return self._sum(layer, h, self._pinned[layer], self._guess)

    def _sum(self, layer: int, h: Floats, groups: Iterable[Kept], multiply: Multiplier) -> Floats:
        """[T, W]: the shares of some groups of a layer in its FFN of h [T, H], in order."""
        y = np.zeros((len(h), self._model.share_width), np.float32)
        entering = multiply.entering(self._forms[layer].row, h)
        calls = (partial(multiply, group, entering) for group in groups)
        for share in in_turn(self._workers, calls, self._most):
            y += share
        return y

    def _coming(self, layer: int, on_step: OnStep) -> Generator[Kept]:
        """The groups of a layer that stream past, in order. Those that there is room for stay."""
        pinned = self._pinned[layer]
        for section in self._sections[layer]:
            for extent, groups in self.stream.section(section):
                at = self._parts[section].first + extent.first
                for number, group in enumerate(groups, at):
                    if number == len(pinned) < self._goal[layer]:
                        pinned.append(self._shelf.copy(group))
                    yield group
                on_step(layer, self._model.layers, self.card.bytes_read)

    def lend(self, nbytes: int) -> None:
        self._lent = nbytes
        self._make_room()

    def _make_room(self) -> None:
        """If there is room for fewer groups, some are let go at once; more stay when they next stream past."""
        self._goal = self._plan.pinned_beside(self._lent + self._of_prompts)
        for pinned, goal in zip(self._pinned, self._goal, strict=False):
            del pinned[goal:]
        self._shelf.empty()  # else it would be kept for other groups, and not for the KV cache

    def _settle(self) -> None:
        """Has the card give what no longer is in RAM, and no more what now is."""
        here, goal = self._here, self._goal
        if (here, goal) != self._scheduled:
            self.stream.restart(stream_past(self._bundle.header, here, self._plan.head_rows, goal))
            self._scheduled = here, goal

    def _keep(self, extent: Extent, raw: Bytes) -> list[Any]:
        """What was read, groups or parts of the head; called in the thread that read it."""
        if extent.section == len(self._parts):
            return self.head_rows.kept(self.head_rows.form.views(raw), self._passing)
        part = self._parts[extent.section]
        form = self._forms[part.layer]
        if part.form == form:
            return [Kept(form, record) for record in raw]
        groups = part.form.groups(raw)
        return [self._passing.keep(form, groups[i : i + 1]) for i in range(len(groups))]

    def restart(self) -> None:
        self.stream.restart()

    def close(self) -> None:
        self.stream.close()
        self._workers.shutdown()
