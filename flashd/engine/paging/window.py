"""The window: a bounded set of units (groups of bundles, or neurons) in RAM, in slots whose used part is contiguous.

Section 3.3 of "LLM in a flash": nothing is allocated while tokens are made, a unit that leaves is replaced
by the last one, and so the product always runs over one dense block of rows, in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.formats import GroupFormat, NeuronFormat, PairFormat
from flashd.bundle.slots import Groups, Slots
from flashd.system import freed_memory

Ids = npt.NDArray[np.int32]


class Window:
    """Slots for up to `capacity` of `units` units, each a group or, as an expert is, `size` groups.

    It holds no policy: who uses it decides what comes in and what goes.
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
        """The units that are here, in slot order."""
        return self._unit_at[: self.used]

    @property
    def rows(self) -> Any:
        """The used part of the slots."""
        return self._part(0, self.used * self.size)

    def groups_of(self, unit: int, first: int, n: int) -> Groups:
        """Groups first, first + 1, ... of a unit, in place. Raises KeyError where it is not here."""
        slot = int(self._slot_of[unit])
        if slot < 0:
            raise KeyError(unit)
        part = self._part(slot * self.size + first, n)
        assert isinstance(part, Groups)
        return part

    def rows_of(self, units: Ids) -> Any:
        """A copy of the rows of some units of one slot each that are here."""
        return self._slots[self._slot_of[units]]

    def here(self) -> npt.NDArray[np.bool_]:
        """[units]: which are here."""
        return self._slot_of >= 0

    def insert(self, first: int, rows: Slots) -> None:
        """Copies units first, first + 1, ..., all their groups, into free slots, see `put`."""
        self.put(np.arange(first, first + len(rows) // self.size, dtype=np.int32), rows)

    def put(self, units: Ids, rows: Slots) -> None:
        """Copies units into free slots. None of them may be here already.

        Raises ValueError where they do not fit or one is here.
        """
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
        """Copies a unit's groups from its `first` on, and returns them in place; a new unit takes a free slot.

        Until all of them have come the slot holds something else. Raises ValueError where no slot is free.
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
        """Frees a unit's slot: the last used slot's unit moves into it. Raises KeyError."""
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
        """Frees all slots but the first `used`, and gives their memory to the system until they are used again."""
        if used < self.used:
            self._slot_of[self._unit_at[used : self.used]] = -1
            self._unit_at[used : self.used] = -1
            self.used = used
            self.give_back()

    def give_back(self) -> None:
        """Gives the memory of the free slots to the system, until they are used."""
        for array in self._part(self.used * self.size, (self.capacity - self.used) * self.size).arrays():
            freed_memory.give_back(array)

    def _part(self, first: int, n: int) -> Slots:
        return self._slots[first : first + n]
