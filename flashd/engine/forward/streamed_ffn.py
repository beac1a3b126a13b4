"""FFNs in which every neuron takes part: the hottest groups stay in RAM, the others stream past in each pass."""

from __future__ import annotations

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import FfnSection, Header
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Floats
from flashd.engine.forward import products
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.paging.card import CardStream, Extent, extents
from flashd.engine.paging.window import Window
from flashd.engine.planning.plan import Plan

AT_ONCE = 8
"""Groups that are copied, and if need be widened to 4 bits, together."""


def stream_past(header: Header, pinned: int, head_rows: int) -> list[Extent]:
    """The reads of a pass that needs every neuron: the groups that are not pinned, then the head's other rows.

    `pinned` is the number of groups of each layer that are in RAM, `head_rows` that of the head's rows.
    """
    sections, schedule = header.ffn_sections, []
    for number, section in enumerate(sections):
        groups = range(min(max(pinned - section.first, 0), section.count), section.count)
        schedule += extents(number, groups, section.form.nbytes)
    runs = range(-(-head_rows // ROWS_OF_A_RUN), -(-header.model.vocabulary // ROWS_OF_A_RUN))
    return schedule + extents(len(sections), runs, ROWS_OF_A_RUN * header.row_format("head").nbytes)


class StreamedFfn:
    """The FeedForward of a bundle without a selection or experts.

    The hottest groups of each layer are pinned. While the KV cache lends memory, the first of those that stream past
    stay in it. The same `stream` gives the head's other rows behind the last layer, see head.py.
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self._bundle, self._plan = bundle, plan
        self._model: Architecture = bundle.header.model
        self._form = bundle.header.group
        self._product = products.Ffn(bundle.read("graph.ffn"), self._model)
        # of each layer: its sections, with their numbers among the sections of all layers
        self._sections: list[list[tuple[int, FfnSection]]] = [[] for _ in range(self._model.layers)]
        for number, section in enumerate(bundle.header.ffn_sections):
            self._sections[section.layer].append((number, section))
        self._pinned: list[Window] = []
        self._passing = Window(self._form, self._model.groups, plan.passing_groups)
        # groups of each layer: those that the stream leaves out, and those that there is memory for
        self._scheduled = self._goal = plan.pinned_groups
        self.stream = CardStream(bundle, stream_past(bundle.header, plan.pinned_groups, plan.head_rows), plan.buffers)
        self._needed = self._found = 0

    @property
    def card(self) -> CardStats:
        return self.stream.stats

    @property
    def hit_rate(self) -> float:
        return self._found / self._needed if self._needed else self._plan.pinned_share

    @property
    def shares_reads(self) -> bool:
        return self._here < self._model.groups or self._plan.head_rows < self._model.vocabulary

    @property
    def drafts(self) -> bool:
        return self.shares_reads and self._here > 0

    @property
    def _here(self) -> int:
        """Groups that are pinned in every layer."""
        return min(pinned.used for pinned in self._pinned)

    def load(self, layer: int) -> None:
        capacity = self._plan.pinned_groups + self._plan.lent_groups
        pinned = Window(self._form, self._model.groups, capacity)
        pinned.give_back()
        for first, groups in self._bundle.groups(layer, self._plan.pinned_groups):
            pinned.insert(first, groups)
        self._pinned.append(pinned)
        if len(self._pinned) == self._model.layers:
            self.stream.read_ahead()

    def enter(self, layer: int, x: Floats) -> None:
        """Does nothing: every group is needed, whatever x is."""

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        if layer == 0:
            self._settle()
        y = self.from_ram(layer, h)  # [T, H]
        self._found += self._pinned[layer].used
        self._needed += self._model.groups
        for number, section in self._sections[layer]:
            for extent, raw in self.stream.section(number):
                for at in range(0, len(raw), AT_ONCE):
                    groups = section.form.groups(raw[at : at + AT_ONCE])
                    self._passing.insert(section.first + extent.first + at, groups)
                y += self._product(h, self._passing.rows)
                self._stay(layer)
                self._passing.clear()
                on_step(layer, self._model.layers, self.card.bytes_read)
        return y

    def from_ram(self, layer: int, h: Floats) -> Floats:
        return self._product(h, self._pinned[layer].rows)

    def lend(self, nbytes: int) -> None:
        """Lets groups go at once if there is less memory. If there is more, groups stay as they stream past."""
        self._goal = self._plan.groups_beside(nbytes, self._model.layers * self._form.nbytes)
        for pinned in self._pinned:
            pinned.truncate(self._goal)

    def _settle(self) -> None:
        """Makes the stream give the groups that are not in RAM, and no others."""
        # a pass that broke off leaves more groups in some layers than in others
        kept = self._here
        for pinned in self._pinned:
            pinned.truncate(kept)
        if kept != self._scheduled:
            self.stream.restart(stream_past(self._bundle.header, kept, self._plan.head_rows))
            self._scheduled = kept

    def _stay(self, layer: int) -> None:
        """Pins as many of the groups in `_passing` as there is room for."""
        pinned, first = self._pinned[layer], int(self._passing.units[0])
        count = min(self._goal - pinned.used, self._passing.used)
        if count > 0 and first == pinned.used:
            pinned.insert(first, self._passing.rows[:count])

    def restart(self) -> None:
        self._passing.clear()
        self.stream.restart()

    def close(self) -> None:
        self.stream.close()
