"""The window against a dictionary: whatever comes and goes, the used slots hold exactly what should be there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashd.bundle.arrays import QuantGroups
from flashd.bundle.formats import GroupFormat
from flashd.engine.paging.window import Window

FORM = GroupFormat("int4", 32)
UNITS, CAPACITY = 12, 5
RAW = np.random.default_rng(0).integers(0, 256, (UNITS, FORM.nbytes), dtype=np.uint8)


def groups(first: int, n: int) -> QuantGroups:
    views = FORM.views(RAW[first : first + n])
    assert isinstance(views, QuantGroups)
    return views


class WindowMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.window = Window(FORM, UNITS, CAPACITY)
        self.here: set[int] = set()

    @rule(first=st.integers(0, UNITS - 1), n=st.integers(1, 3))
    def insert(self, first: int, n: int) -> None:
        n = min(n, UNITS - first)
        units = set(range(first, first + n))
        if units & self.here or len(self.here) + n > CAPACITY:
            with pytest.raises(ValueError, match=r"free slots|already"):
                self.window.insert(first, groups(first, n))
        else:
            self.window.insert(first, groups(first, n))
            self.here |= units

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.here)))
        self.window.delete(unit)
        self.here.remove(unit)

    @rule(unit=st.integers(0, UNITS - 1))
    def delete_what_is_not_here(self, unit: int) -> None:
        if unit not in self.here:
            with pytest.raises(KeyError):
                self.window.delete(unit)

    @rule()
    def clear(self) -> None:
        self.window.clear()
        self.here.clear()

    @invariant()
    def the_used_slots_hold_what_is_here(self) -> None:
        assert self.window.used == len(self.here) <= CAPACITY
        assert set(self.window.units.tolist()) == self.here
        assert {u for u in range(UNITS) if u in self.window} == self.here
        assert set(np.flatnonzero(~self.window.here()).tolist()) == set(range(UNITS)) - self.here
        for slot, unit in enumerate(self.window.units.tolist()):
            for array, source in zip(self.window.rows.arrays(), groups(unit, 1).arrays(), strict=True):
                assert array[slot].tobytes() == source[0].tobytes()


def test_a_unit_of_several_groups_comes_in_parts_and_moves_as_one() -> None:
    window = Window(FORM, 4, 2, size=3)

    def raw(unit: int, first: int = 0, n: int = 3) -> bytes:
        return b"".join(a[3 * unit + first : 3 * unit + first + n].tobytes() for a in groups(0, UNITS).arrays())

    window.fill(2, 0, groups(6, 2))
    assert 2 in window and window.used == 1
    window.fill(1, 0, groups(3, 3))
    filled = window.fill(2, 2, groups(8, 1))
    assert b"".join(a.tobytes() for a in filled.arrays()) == raw(2, 2, 1)
    with pytest.raises(ValueError, match="no free slot"):
        window.fill(0, 0, groups(0, 3))
    window.delete(2)
    assert window.units.tolist() == [1] and np.flatnonzero(~window.here()).tolist() == [0, 2, 3]
    window.insert(3, groups(9, 3))
    for unit in (1, 3):
        here = window.groups_of(unit, 0, 3)
        assert b"".join(a.tobytes() for a in here.arrays()) == raw(unit)
    with pytest.raises(KeyError):
        window.groups_of(2, 0, 3)


WindowMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestWindow = WindowMachine.TestCase
