"""The window: a bounded set of units in RAM, in slots. The used slots are contiguous. A unit is a group or a neuron.

"LLM in a flash", section 3.3: nothing is allocated while tokens are made. If a unit leaves, the last one takes its
slot, so a product always runs over one dense block of rows in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import Arrays, Groups
from flashd.bundle.formats import GroupFormat, NeuronFormat, PairFormat
from flashd.system import freed_memory

Ids = npt.NDArray[np.int32]
"""[n] int32: numbers of units."""


class Window:
    """Slots for units. It has no policy: its user decides which units come in and which go.

    Args:
        form: how a group, or a neuron, is written.
        units: how many units there are; they are numbered from 0.
        capacity: the most units that are held at once.
        size: groups of a unit: 1, or those of an expert.
    """

    def __init__(
        self, form: GroupFormat | NeuronFormat | PairFormat, units: int, capacity: int, size: int = 1
    ) -> None:
        self.capacity = capacity
        self.size = size
        self.used = 0
        self._slots = form.empty(capacity * size)
        self._slot_of: Ids = np.full(units, -1, np.int32)
        self._unit_at: Ids = np.full(capacity, -1, np.int32)

    def __contains__(self, unit: int) -> bool:
        return bool(self._slot_of[unit] >= 0)

    @property
    def units(self) -> Ids:
        """[used]: the numbers of the units that are here, in the order of their slots."""
        return self._unit_at[: self.used]

    @property
    def rows(self) -> Any:
        """The weights in the used slots, in place."""
        return self._part(0, self.used * self.size)

    def groups_of(self, unit: int, first: int, n: int) -> Groups:
        """Groups `first` to `first + n - 1` of a unit, in place. Raises KeyError if the unit is not here."""
        slot = int(self._slot_of[unit])
        if slot < 0:
            raise KeyError(unit)
        part = self._part(slot * self.size + first, n)
        assert isinstance(part, Groups)
        return part

    def rows_of(self, units: Ids) -> Any:
        """A copy of the weights of `units` [n], which are here and have one group or neuron each."""
        return self._slots[self._slot_of[units]]

    def here(self) -> npt.NDArray[np.bool_]:
        """[units] bool: which units are here."""
        return self._slot_of >= 0

    def insert(self, first: int, rows: Arrays) -> None:
        """Copies consecutive units from `first` on, with all their groups, into free slots. See `put`."""
        self.put(np.arange(first, first + len(rows) // self.size, dtype=np.int32), rows)

    def put(self, units: Ids, rows: Arrays) -> None:
        """Copies `units` [n] into free slots. Raises ValueError if they do not fit or one is here already."""
        stop = self.used + len(units)
        if stop > self.capacity:
            raise ValueError(f"{len(units)} units for {self.capacity - self.used} free slots")
        if (self._slot_of[units] >= 0).any():
            raise ValueError(f"one of units {units.min()} to {units.max()} is in the window already")
        self._part(self.used * self.size, len(units) * self.size).take(rows)
        self._slot_of[units] = np.arange(self.used, stop)
        self._unit_at[self.used : stop] = units
        self.used = stop

    def fill(self, unit: int, first: int, groups: Groups) -> Groups:
        """Copies some groups of a unit, from its group `first` on, and returns them in place.

        A unit that is not here takes a free slot. The slot is not valid until all of its groups have come. Raises
        ValueError if no slot is free.
        """
        if unit not in self:
            if self.used == self.capacity:
                raise ValueError("no free slot")
            self._slot_of[unit], self._unit_at[self.used] = self.used, unit
            self.used += 1
        part = self.groups_of(unit, first, len(groups))
        part.take(groups)
        return part

    def delete(self, unit: int) -> None:
        """Frees a unit's slot. The unit of the last used slot moves there. Raises KeyError if `unit` is not here."""
        slot = int(self._slot_of[unit])
        if slot < 0:
            raise KeyError(unit)
        last = self.used - 1
        if slot != last:
            self._part(slot * self.size, self.size).take(self._part(last * self.size, self.size))
            moved = self._unit_at[last]
            self._unit_at[slot] = moved
            self._slot_of[moved] = slot
        self._unit_at[last] = -1
        self._slot_of[unit] = -1
        self.used = last

    def clear(self) -> None:
        """Frees every slot."""
        self._slot_of[self.units] = -1
        self._unit_at[:] = -1
        self.used = 0

    def truncate(self, used: int) -> None:
        """Frees all slots but the first `used`, and gives their memory to the system."""
        if used < self.used:
            self._slot_of[self._unit_at[used : self.used]] = -1
            self._unit_at[used : self.used] = -1
            self.used = used
            self.give_back()

    def give_back(self) -> None:
        """Gives the memory of the free slots to the system. It is taken again when they are written."""
        for array in self._part(self.used * self.size, (self.capacity - self.used) * self.size).arrays():
            freed_memory.give_back(array)

    def _part(self, first: int, n: int) -> Arrays:
        return self._slots[first : first + n]
