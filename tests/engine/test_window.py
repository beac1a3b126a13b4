"""The window against a dictionary: whatever comes and goes, the used slots hold exactly what should be there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashd.bundle.arrays import NeuronArrays
from flashd.bundle.rows.formats import NeuronFormat
from flashd.engine.paging.window import Window

FORM = NeuronFormat("int4", 32, biases=2)
NEURONS, CAPACITY = 12, 5
RAW = np.random.default_rng(0).integers(0, 256, (NEURONS, FORM.nbytes), dtype=np.uint8)
RAW[:, -8:] = np.arange(2 * NEURONS, dtype=np.float32).reshape(NEURONS, 2).view(np.uint8)  # biases that are numbers


def rows(neurons: list[int]) -> NeuronArrays:
    return FORM.views(RAW[neurons])


class WindowMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.window = Window(FORM, NEURONS, CAPACITY)
        self.here: set[int] = set()

    @rule(neurons=st.lists(st.integers(0, NEURONS - 1), max_size=4, unique=True))
    def put(self, neurons: list[int]) -> None:
        if set(neurons) & self.here or len(self.here) + len(neurons) > CAPACITY:
            with pytest.raises(ValueError, match=r"free slots|already"):
                self.window.put(np.array(neurons, np.int32), rows(neurons))
        else:
            self.window.put(np.array(neurons, np.int32), rows(neurons))
            self.here |= set(neurons)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        neuron = data.draw(st.sampled_from(sorted(self.here)))
        self.window.delete(neuron)
        self.here.remove(neuron)

    @rule(neuron=st.integers(0, NEURONS - 1))
    def delete_what_is_not_here(self, neuron: int) -> None:
        if neuron not in self.here:
            with pytest.raises(KeyError):
                self.window.delete(neuron)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def look_at_some(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.here)), unique=True))
        found = self.window.rows_of(np.array(some, np.int32))
        assert [a.tobytes() for a in found.arrays()] == [a.tobytes() for a in rows(some).arrays()]

    @invariant()
    def the_used_slots_hold_what_is_here(self) -> None:
        assert self.window.used == len(self.here) == len(self.window.rows) <= CAPACITY
        assert set(self.window.neurons.tolist()) == self.here
        assert {n for n in range(NEURONS) if n in self.window} == self.here
        assert set(np.flatnonzero(~self.window.here()).tolist()) == set(range(NEURONS)) - self.here
        for slot, neuron in enumerate(self.window.neurons.tolist()):
            for array, source in zip(self.window.rows.arrays(), rows([neuron]).arrays(), strict=True):
                assert array[slot].tobytes() == source[0].tobytes()


WindowMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestWindow = WindowMachine.TestCase
