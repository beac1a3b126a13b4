"""The window: a bounded set of bundle groups in RAM, in preallocated slots whose used part is contiguous.

Section 3.3 of "LLM in a flash": nothing is allocated while tokens are made, a group that leaves is replaced
by the last one, and so the product always runs over one dense block of rows, in place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows import GroupFormat, Groups

Ids = npt.NDArray[np.int32]


class Window:
    """Slots for up to `capacity` of `units` groups.

    It holds no policy: who uses it decides what comes in and what goes.
    """

    def __init__(self, form: GroupFormat, units: int, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._slots = form.empty(capacity)
        self._slot_of: Ids = np.full(units, -1, np.int32)
        self._unit_at: Ids = np.full(capacity, -1, np.int32)

    def __contains__(self, unit: int) -> bool:
        return bool(self._slot_of[unit] >= 0)

    @property
    def units(self) -> Ids:
        """The groups that are here, in slot order."""
        return self._unit_at[: self.used]

    @property
    def rows(self) -> Groups:
        """The used part of the slots."""
        part = self._slots[: self.used]
        assert isinstance(part, Groups)
        return part

    def missing(self) -> Ids:
        """The groups that are not here, ascending."""
        return np.flatnonzero(self._slot_of < 0).astype(np.int32)

    def insert(self, first: int, groups: Groups) -> None:
        """Copies groups first, first + 1, ... into free slots. None of them may be here already.

        Raises ValueError where they do not fit or one is here.
        """
        n = len(groups)
        if self.used + n > self.capacity:
            raise ValueError(f"{n} groups for {self.capacity - self.used} free slots")
        if (self._slot_of[first : first + n] >= 0).any():
            raise ValueError(f"one of groups {first} to {first + n - 1} is in the window already")
        stop = self.used + n
        for to, source in zip(self._slots[self.used : stop].arrays(), groups.arrays(), strict=True):
            np.copyto(to, source)
        self._slot_of[first : first + n] = np.arange(self.used, stop)
        self._unit_at[self.used : stop] = np.arange(first, first + n)
        self.used = stop

    def delete(self, unit: int) -> None:
        """Frees a group's slot: the last used slot's group moves into it. Raises KeyError."""
        slot = int(self._slot_of[unit])
        if slot < 0:
            raise KeyError(unit)
        last = self.used - 1
        if slot != last:
            for array in self._slots.arrays():
                array[slot] = array[last]
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
