"""A wall clock that jumps: what counts seconds does not notice, what goes by the time of day fires once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from device import triggers
from device.appliance import Appliance
from device.triggers import Clock
from flashd.config.devices import Schedule
from flashd.errors import NotStarted

Make = Callable[..., Appliance]


class Wall:
    """Stands in for datetime in device.triggers."""

    def __init__(self, now: datetime) -> None:
        self.time = now

    def now(self) -> datetime:
        return self.time


def scheduled(monkeypatch: pytest.MonkeyPatch, wall: Wall, **when: Any) -> tuple[Clock, list[str]]:
    """A schedule whose looks at the clock a test makes itself."""
    monkeypatch.setattr(triggers, "datetime", wall)
    fired: list[str] = []
    clock = Clock(Schedule(name="water", prompt="p", **when), lambda name: fired.append(name))
    clock.close()  # its own thread would look every ten seconds
    return clock, fired


def test_a_time_of_day_that_is_jumped_over_fires_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(datetime(2026, 1, 1, 6, 0))
    clock, fired = scheduled(monkeypatch, wall, at="07:30")
    clock._turn()
    assert fired == []
    wall.time = datetime(2026, 1, 3, 12, 0)  # a board without a battery learns the time
    clock._turn()
    clock._turn()
    assert fired == ["water"]
    wall.time += timedelta(days=1)
    clock._turn()
    assert fired == ["water", "water"]


def test_a_clock_that_goes_back_fires_at_the_next_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(datetime(2026, 1, 3, 12, 0))
    clock, fired = scheduled(monkeypatch, wall, at="07:30")
    wall.time = datetime(2026, 1, 1, 7, 0)
    clock._turn()
    wall.time = datetime(2026, 1, 1, 7, 31)
    clock._turn()
    clock._turn()
    assert fired == ["water"]


def test_a_clock_that_goes_back_behind_it_does_not_fire_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As each autumn, where summer time ends."""
    wall = Wall(datetime(2026, 10, 25, 2, 29))
    clock, fired = scheduled(monkeypatch, wall, at="02:30")
    for minutes in (1, -30, 30, 60):
        wall.time += timedelta(minutes=minutes)
        clock._turn()
    assert fired == ["water"]
    wall.time = datetime(2026, 10, 26, 2, 31)
    clock._turn()
    assert fired == ["water"] * 2


def test_a_schedule_in_seconds_does_not_look_at_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(datetime(2026, 1, 1))
    clock, fired = scheduled(monkeypatch, wall, every=3600.0)
    wall.time = datetime(1970, 1, 1)
    assert clock._pause() == 3600.0
    clock._turn()
    assert fired == ["water"]


@pytest.mark.parametrize("ahead", [1e9, -1e9])
def test_a_cool_down_outlives_a_jump(appliance: Make, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    import time

    one = appliance("triggers: [{kind: manual, name: greet, prompt: Greet., cooldown: 3600}]")
    one.start("greet")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    with pytest.raises(NotStarted):
        one.start("greet")
