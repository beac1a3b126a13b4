"""The FFN layers of a model that does not fit: what of them stays in RAM and what comes from the card."""

from __future__ import annotations

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Header, Part
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Floats
from flashd.engine.forward import products
from flashd.engine.model.contract import CardStats, OnStep
from flashd.engine.paging.card import CardStream, Extent, extents
from flashd.engine.paging.window import Window
from flashd.engine.planning.plan import Plan

AT_ONCE = 8
"""Groups that are widened together, beside the slots that they go to."""


def stream_past(header: Header, pinned: int, head_rows: int) -> list[Extent]:
    """What a pass that needs everything finds on the card: the groups that are not pinned, then rows of the head."""
    parts, schedule = header.ffn_parts, []
    for section, part in enumerate(parts):
        groups = range(min(max(pinned - part.first, 0), part.count), part.count)
        schedule += extents(section, groups, part.form.nbytes)
    runs = range(-(-head_rows // ROWS_OF_A_RUN), -(-header.model.vocabulary // ROWS_OF_A_RUN))
    return schedule + extents(len(parts), runs, ROWS_OF_A_RUN * header.row_format("head").nbytes)


class StreamedFfn:
    """Every neuron takes part: the hottest groups are pinned, the others stream past once for a pass.

    While memory is lent, the first of those that stream past stay until it is wanted back. Behind the layers the
    head's unlikely rows stream past too, see engine.head.
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self._bundle, self._plan = bundle, plan
        self._model: Architecture = bundle.header.model
        self._form = bundle.header.group
        self._product = products.Ffn(bundle.read("graph.ffn"), self._model)
        self._parts: list[list[tuple[int, Part]]] = [[] for _ in range(self._model.layers)]  # with their sections
        for section, part in enumerate(bundle.header.ffn_parts):
            self._parts[part.layer].append((section, part))
        self._pinned: list[Window] = []
        self._passing = Window(self._form, self._model.groups, plan.passing_groups)
        self._scheduled = self._goal = plan.pinned_groups  # groups of each layer that are pinned, and that may be
        self.stream = CardStream(bundle, stream_past(bundle.header, plan.pinned_groups, plan.head_rows), plan.buffers)
        self._needed = self._found = 0

    @property
    def card(self) -> CardStats:
        return self.stream.stats

    @property
    def hit_rate(self) -> float:
        return self._found / self._needed if self._needed else self._plan.pinned_share

    @property
    def pages(self) -> bool:
        return self._here < self._model.groups or self._plan.head_rows < self._model.vocabulary

    @property
    def drafts(self) -> bool:
        return self.pages and self._here > 0

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
        """Every group is needed, whatever comes."""

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        if layer == 0:
            self._settle()
        y = self.from_ram(layer, h)  # [T, H]
        self._found += self._pinned[layer].used
        self._needed += self._model.groups
        for section, part in self._parts[layer]:
            for extent, raw in self.stream.section(section):
                for at in range(0, len(raw), AT_ONCE):
                    self._passing.insert(part.first + extent.first + at, part.form.groups(raw[at : at + AT_ONCE]))
                y += self._product(h, self._passing.rows)
                self._stay(layer)
                self._passing.clear()
                on_step(layer, self._model.layers, self.card.bytes_read)
        return y

    def from_ram(self, layer: int, h: Floats) -> Floats:
        return self._product(h, self._pinned[layer].rows)

    def lend(self, nbytes: int) -> None:
        """Fewer groups are let go at once; more stay when they next stream past."""
        self._goal = self._plan.groups_beside(nbytes, self._model.layers * self._form.nbytes)
        for pinned in self._pinned:
            pinned.truncate(self._goal)

    def _settle(self) -> None:
        """Has the card give what no longer is in RAM, and no more what now is."""
        # a pass that broke off leaves more in some layers than in others
        kept = self._here
        for pinned in self._pinned:
            pinned.truncate(kept)
        if kept != self._scheduled:
            self.stream.restart(stream_past(self._bundle.header, kept, self._plan.head_rows))
            self._scheduled = kept

    def _stay(self, layer: int) -> None:
        """Pins what of the groups that stream past there is room for."""
        pinned, first = self._pinned[layer], int(self._passing.units[0])
        count = min(self._goal - pinned.used, self._passing.used)
        if count > 0 and first == pinned.used:
            pinned.insert(first, self._passing.rows[:count])

    def restart(self) -> None:
        self._passing.clear()
        self.stream.restart()

    def close(self) -> None:
        self.stream.close()
