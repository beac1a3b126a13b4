"""Buttons, motion, doors, nearness, menus and the clock, through gpiozero's mock electronics."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gpiozero.pins.mock import MockFactory

from device.appliance import Appliance
from device.outputs import display
from device.sensors.sensors import Sensors
from device.triggers import Triggers, next_time
from flashd.config.settings import parse
from flashd.daemon.job import Job
from flashd.daemon.jobs import Jobs
from flashd.errors import ConfigError, NotStarted
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import Echo, press
from tests.waiting import wait

Fired = list[tuple[str, dict[str, Any]]]
Listen = Callable[[str], Fired]
Make = Callable[..., Appliance]


@pytest.fixture
def listen(pins: MockFactory) -> Iterator[Listen]:
    """Opens the triggers of some YAML; what they fire is collected."""
    opened: list[Any] = []

    def make(text: str) -> Fired:
        settings = parse(text)
        fired: Fired = []
        sensors = Sensors(settings.sensors)
        opened.append(Triggers(settings.triggers, sensors, lambda name, **values: fired.append((name, values))))
        opened.append(sensors)
        return fired

    yield make
    for each in opened:
        each.close()


def test_a_double_press_has_its_own_trigger_s_gap(pins: MockFactory, listen: Listen) -> None:
    entry = "{{kind: button, name: {0}, pin: 4, press: {0}, prompt: p, bounce: 0, gap: {1}}}"
    fired = listen(f"triggers: [{entry.format('short', 0.01)}, {entry.format('double', 5)}]")
    press(pins.pin(4))
    time.sleep(0.2)  # longer than the short one's gap
    press(pins.pin(4))
    assert [name for name, _ in fired] == ["double"]


BUTTON = "{{kind: button, name: {0}, pin: 4, press: {0}, prompt: p, bounce: 0, hold: 1, gap: 1}}"


def test_a_short_press_alone_fires_at_once(pins: MockFactory, listen: Listen) -> None:
    fired = listen(f"triggers: [{BUTTON.format('short')}]")
    press(pins.pin(4))
    assert fired == [("short", {})]


def test_short_long_and_double_are_told_apart(pins: MockFactory, listen: Listen) -> None:
    fired = listen("triggers: [" + ", ".join(BUTTON.format(p) for p in ("short", "long", "double")) + "]")
    button = pins.pin(4)
    press(button)
    wait(lambda: fired)
    button.drive_low()
    wait(lambda: len(fired) == 2)  # a long press is one before the button is let go
    button.drive_high()
    press(button)
    press(button)
    wait(lambda: len(fired) == 3)
    assert [name for name, _ in fired] == ["short", "long", "double"]


def test_the_kernel_is_asked_to_debounce(pins: MockFactory, listen: Listen) -> None:
    """The mock does not model bounce; on a board the pin's driver keeps it from us."""
    listen("triggers: [{kind: button, name: a, pin: 4, prompt: p, bounce: 0.1}]")
    assert pins.pin(4).bounce == 0.1


def test_motion_and_door(pins: MockFactory, listen: Listen) -> None:
    fired = listen(
        "triggers: [{kind: motion, name: m, pin: 5, prompt: p}, {kind: door, name: o, pin: 6, prompt: p, bounce: 0},"
        " {kind: door, name: c, pin: 7, when: close, prompt: p, bounce: 0}]"
    )
    time.sleep(0.3)  # gpiozero takes samples of a motion sensor: it must have seen stillness
    pins.pin(5).drive_high()
    wait(lambda: fired)
    for number in (6, 7):
        pins.pin(number).drive_low()  # the magnet closes the contact
    for number in (6, 7):
        pins.pin(number).drive_high()
    assert [name for name, _ in fired] == ["m", "c", "o"]


def test_a_menu_goes_round_and_a_press_picks(pins: MockFactory, listen: Listen) -> None:
    fired = listen(
        "triggers: [{kind: rotary, name: r, a: 5, b: 6, button: 7, bounce: 0, prompt: p, menu: [one, two, three]}]"
    )
    a, b = pins.pin(5), pins.pin(6)
    press(pins.pin(7))
    turn(a, b)
    press(pins.pin(7))
    for _ in range(2):
        turn(b, a)
    press(pins.pin(7))
    choices = [values["choice"] for _, values in fired]
    assert choices[0] == "one" and set(choices[1:]) == {"two", "three"}


def turn(first: Any, second: Any) -> None:
    """One step of a rotary encoder, whose contacts close one after the other."""
    for pin, low in ((first, True), (second, True), (first, False), (second, False)):
        pin.drive_low() if low else pin.drive_high()


@pytest.mark.display
def test_what_a_menu_stands_at_is_on_the_display(
    pins: MockFactory, appliance: Callable[..., Appliance], monkeypatch: pytest.MonkeyPatch
) -> None:
    luma = pytest.importorskip("luma.core.device")
    screen = luma.dummy(width=128, height=64, mode="1")
    monkeypatch.setattr(display, "luma_device", lambda settings: screen)
    appliance(
        "triggers: [{kind: rotary, name: r, a: 5, b: 6, button: 7, bounce: 0, prompt: p, menu: [one, two, three]}]\n"
        "outputs: [{kind: display}]"
    )
    shown = {screen.image.tobytes()}
    for _ in range(3):
        turn(pins.pin(5), pins.pin(6))
        shown.add(screen.image.tobytes())
    assert len(shown) == 4  # loading, and each of three choices


def test_a_trigger_that_is_gone_or_fails_ends_nothing(
    pins: MockFactory, appliance: Make, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Drivers call back from one thread for all pins: what they set off is started in another."""
    caplog.set_level(logging.INFO)
    one = appliance("triggers: [{kind: button, name: ask, pin: 4, bounce: 0, prompt: Hello}]")
    threads: list[str] = []
    start: Callable[..., Job] = one.start

    def noted(name: str, **values: str | float) -> Job:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            raise RuntimeError("nobody thought of this")
        return start(name, **values)

    monkeypatch.setattr(one, "start", noted)
    press(pins.pin(4))
    wait(lambda: "nobody thought of this" in caplog.text)
    one._fire("nobody")
    press(pins.pin(4))
    wait(lambda: jobs.waiting == 1)
    assert threads == ["triggers"] * 3 and "trigger nobody went off as it was taken away" in caplog.text


@pytest.mark.slow
def test_nearness_fires_once_until_it_has_gone(pins: MockFactory, listen: Listen) -> None:
    wall = Echo(pins, echo=5, trigger=6)
    wall.metres = 5.0  # beyond its range of 4
    fired = listen(
        "sensors: [{kind: distance, name: d, echo: 5, trigger: 6, timeout: 30}]\n"
        "triggers: [{kind: near, name: n, sensor: d, below: 3, every: 0.05, prompt: p}]"
    )
    time.sleep(1)
    assert not fired
    wall.metres = 0.1
    wait(lambda: fired, 60)
    time.sleep(1)
    assert len(fired) == 1 and fired[0][1]["distance"] < 3

    def goes_and_comes() -> bool:
        for metres in (5.0, 0.1):
            wall.metres = metres
            time.sleep(1.5)  # the ranger gives the median of nine pings
        return len(fired) > 1

    wait(goes_and_comes, 60)


def test_a_schedule(listen: Listen) -> None:
    fired = listen("triggers: [{kind: schedule, name: s, every: 0.03, prompt: p}]")
    wait(lambda: len(fired) >= 3)
    noon = datetime(2026, 3, 1, 12, 0)
    assert next_time(noon, "12:00") == datetime(2026, 3, 2, 12, 0)
    assert next_time(noon, "12:01") == datetime(2026, 3, 1, 12, 1)
    assert next_time(datetime(2026, 12, 31, 23, 59), "07:30") == datetime(2027, 1, 1, 7, 30)


def test_a_press_becomes_a_job(
    pins: MockFactory, appliance: Callable[..., Appliance], jobs: Jobs, clerk: Clerk
) -> None:
    appliance(
        "sensors: [{kind: ds18b20, name: room, timeout: 0.5}]\n"
        "triggers: [{kind: button, name: front, pin: 4, bounce: 0, cooldown: 60, system: Be kind., priority: 7,"
        " prompt: 'The room has {{ sensors.room }}. Before, you said: {{ last }}'}]",
        sysfs=Path("/nowhere"),
    )
    press(pins.pin(4))
    wait(lambda: clerk.answered)
    press(pins.pin(4))  # too soon
    time.sleep(0.1)
    (job,) = clerk.answered
    assert [t.content for t in job.request.turns] == ["Be kind.", "The room has unknown. Before, you said: "]
    assert (job.request.source, job.request.priority, jobs.waiting) == ("trigger:front", 7, 0)


def test_a_prompt_that_comes_out_empty_asks_nothing(appliance: Make, jobs: Jobs, clerk: Clerk) -> None:
    one = appliance(
        "triggers: [{kind: manual, name: sum, cooldown: 3600, prompt: '{% if last %}Sum up: {{ last }}{% endif %}'},"
        " {kind: manual, name: greet, prompt: Greet.}]"
    )
    with pytest.raises(NotStarted, match="'sum' was not started: its prompt is empty at the moment"):
        one.start("sum")
    assert not jobs.recent(9)
    one.start("greet")
    wait(lambda: jobs.last_text)
    assert "Sum up: It is warm today." in one.start("sum").request.turns[-1].content  # it did not cool down


def test_muted_triggers_start_nothing(
    pins: MockFactory, appliance: Callable[..., Appliance], jobs: Jobs, clerk: Clerk
) -> None:
    one = appliance("mute_pin: 9\ntriggers: [{kind: button, name: a, pin: 4, bounce: 0, prompt: p}]")
    press(pins.pin(9), 0.1)
    assert one.muted
    press(pins.pin(4))
    time.sleep(0.1)
    assert not clerk.answered and jobs.waiting == 0
    press(pins.pin(9), 0.1)
    press(pins.pin(4))
    wait(lambda: clerk.answered)


def test_reload_changes_triggers_and_a_bad_one_changes_nothing(
    pins: MockFactory, appliance: Callable[..., Appliance], clerk: Clerk
) -> None:
    one = appliance("triggers: [{kind: button, name: a, pin: 4, bounce: 0, prompt: old}]")
    one.reload(parse("triggers: [{kind: button, name: a, pin: 5, bounce: 0, prompt: new}]"))
    press(pins.pin(4))
    press(pins.pin(5))
    wait(lambda: clerk.answered)
    assert [j.request.turns[-1].content for j in clerk.answered] == ["new"]
    with pytest.raises(ConfigError, match="weather"):
        one.reload(parse("triggers: [{kind: button, name: a, pin: 6, prompt: '{{ weather }}'}]"))
    press(pins.pin(5))
    wait(lambda: len(clerk.answered) == 2)
    with pytest.raises(ConfigError, match="a pin cannot be used"):
        one.reload(parse("triggers: [{kind: button, name: a, pin: 63, prompt: p}]"))
    press(pins.pin(5))
    wait(lambda: len(clerk.answered) == 3)
