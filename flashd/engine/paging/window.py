"""The window: a bounded set of neurons in RAM, in slots whose used part is contiguous.

Section 3.3 of "LLM in a flash": nothing is allocated while tokens are made, and a neuron that leaves is replaced by
the last one, so that a product runs over one dense block of rows, in place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import NeuronArrays
from flashd.bundle.rows.formats import NeuronFormat

Ids = npt.NDArray[np.int32]


class Window:
    """Slots for up to `capacity` of `neurons` neurons.

    It holds no policy: its user decides what comes in and what goes.
    """

    def __init__(self, form: NeuronFormat, neurons: int, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._slots = form.empty(capacity)
        self._slot_of: Ids = np.full(neurons, -1, np.int32)
        self._neuron_at: Ids = np.full(capacity, -1, np.int32)

    def __contains__(self, neuron: int) -> bool:
        return bool(self._slot_of[neuron] >= 0)

    @property
    def neurons(self) -> Ids:
        """The neurons that are here, in slot order."""
        return self._neuron_at[: self.used]

    @property
    def rows(self) -> NeuronArrays:
        """The used part of the slots."""
        return self._slots[: self.used]

    def rows_of(self, neurons: Ids) -> NeuronArrays:
        """A copy of the rows of some neurons that are here."""
        return self._slots[self._slot_of[neurons]]

    def here(self) -> npt.NDArray[np.bool_]:
        """[neurons]: which are here."""
        return self._slot_of >= 0

    def put(self, neurons: Ids, rows: NeuronArrays) -> None:
        """Copies neurons into free slots. Raises ValueError if they do not fit, or one is here already."""
        stop = self.used + len(neurons)
        if stop > self.capacity:
            raise ValueError(f"{len(neurons)} neurons for {self.capacity - self.used} free slots")
        if (self._slot_of[neurons] >= 0).any():
            raise ValueError(f"one of neurons {neurons.min()} to {neurons.max()} is in the window already")
        self._slots[self.used : stop].take(rows)
        self._slot_of[neurons] = np.arange(self.used, stop)
        self._neuron_at[self.used : stop] = neurons
        self.used = stop

    def delete(self, neuron: int) -> None:
        """Frees a neuron's slot: that of the last used slot moves into it. Raises KeyError if it is not here."""
        slot = int(self._slot_of[neuron])
        if slot < 0:
            raise KeyError(neuron)
        last = self.used - 1
        if slot != last:
            self._slots[slot : slot + 1].take(self._slots[last : last + 1])
            moved = self._neuron_at[last]
            self._neuron_at[slot] = moved
            self._slot_of[moved] = slot
        self._neuron_at[last] = -1
        self._slot_of[neuron] = -1
        self.used = last
