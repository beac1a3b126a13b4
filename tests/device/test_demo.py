"""The demo: its board in words, what is told of triggers, and fingers on mock pins."""

from __future__ import annotations

import re

import gpiozero
import msgspec
import pytest

from device import demo
from device.mock_board import MockBoard, Part, Role
from flashd.config.settings import parse
from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.tried_demo import Tried, tried
from tests.waiting import wait

__all__ = ["tried"]  # a fixture


def test_a_button_is_pressed_and_its_answer_told(tried: Tried, clerk: Clerk) -> None:
    assert tried.press("/demo/press/17") == (200, {"pressed": 17})
    wait(lambda: "the answer: It is warm today." in tried.screen.said)
    told = tried.screen.said[-5:]
    assert "button 17: pressed" in told
    assert any(line.startswith("button 17: up after ") for line in told)
    asks = "The button “front” asks: Say hello to whoever has just pressed the button."
    assert told.index(asks) < told.index("the answer: It is warm today.")


def test_a_button_is_held(tried: Tried, clerk: Clerk) -> None:
    assert tried.press("/demo/hold/17") == (200, {"pressed": 17})
    wait(lambda: any(line.startswith("The button “held” asks: It is ") for line in tried.screen.said))
    assert not any("“front”" in line for line in tried.screen.said)


def test_a_door_opens_and_a_decision_switches_a_pin(tried: Tried, jobs: Jobs) -> None:
    clerk = Clerk(jobs, words=("yes",))
    wait(lambda: "door 27 ○ closed" in tried.screen.below)
    assert tried.press("/demo/press/27") == (200, {"pressed": 27})
    wait(lambda: "pin 5: on" in tried.screen.said)
    assert "door 27: open" in tried.screen.said
    wait(lambda: "pin 5 ● on" in tried.screen.below and " of 5 s" in tried.screen.below)
    clerk.close()


def test_nothing_is_told_of_pins_before_it_is_ready(tried: Tried) -> None:
    assert tried.screen.said[0].startswith("the cable")


def test_the_line_below_has_every_part_and_its_time(tried: Tried) -> None:
    wait(lambda: tried.screen.below.endswith("s") and "closed" in tried.screen.below)
    pattern = r"LED 22 [●○] [\d.]+ s  pin 5 ○ off [\d.]+ s  button 17 ○ [\d.]+ s  door 27 ○ closed [\d.]+ s"
    assert re.fullmatch(pattern, tried.screen.below)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (98.4, "98 s"),
        (99, "2 min"),
        (5939, "99 min"),
        (5940, "2 h"),
        (3.5e5, "97 h"),
    ],
)
def test_the_line_below_fits_a_terminal_for_days(seconds: float, words: str) -> None:
    assert demo.time_words(seconds) == words
    roles: list[tuple[Role, int, float]] = [
        ("led", 22, 2.95), ("drive", 5, 5900), ("button", 17, 5900), ("door", 27, 5900),
    ]  # fmt: skip
    parts = [Part(role=r, pin=pin, on=False, seconds=s, lasted=0.0, most=5.0) for r, pin, s in roles]
    assert len("  ".join(map(demo.drawn, parts))) < 80
    on = msgspec.structs.replace(parts[1], on=True)
    assert demo.drawn(on) == "pin 5 ● on 5.0 of 5 s"


def test_no_route_of_the_demo_fails(tried: Tried) -> None:
    """A client that raises what the application raises."""
    for how in ("press", "hold"):
        for pin in (0, 1, 5, 22, 28, 99, 10**30):
            status, said = tried.press(f"/demo/{how}/{pin}")
            what = {5: "pin 5 is an output", 22: "LED 22 is an output"}.get(pin, f"there is nothing on pin {pin}")
            assert (status, said) == (404, {"error": f"{what}; what can be touched: button 17, door 27"})


def test_parts_are_on_as_they_are_wired() -> None:
    before = gpiozero.Device.pin_factory
    board = MockBoard()
    settings = parse(
        "outputs: [{kind: led, pin: 3, active_high: false}]\n"
        "triggers:\n"
        "- {kind: button, name: a, pin: 5, pull_up: false, prompt: p}\n"
        "- {kind: motion, name: b, pin: 6, prompt: p}\n"
        "- {kind: door, name: c, pin: 7, pull_up: false, prompt: p}\n"
    )
    with gpiozero.LED(3, active_high=False) as led, gpiozero.Button(5, pull_up=False), gpiozero.MotionSensor(6):
        assert [(p.label, p.word) for p in board.parts(settings)[:3]] == [
            ("LED 3", "off"), ("button 5", "up"), ("motion 6", "still"),
        ]  # fmt: skip
        led.on()
        assert board.parts(settings)[0].word == "on"
        changed: list[tuple[int, str]] = []
        unwatch = board.watch(lambda pin: changed.append((pin, {p.pin: p.word for p in board.parts(settings)}[pin])))
        board.press(settings, 5, 0)
        board.press(settings, 6, 0)
        unwatch()
        board.press(settings, 5, 0)
        assert changed == [(5, "pressed"), (5, "up"), (6, "moves"), (6, "still")]
    board.close()
    gpiozero.Device.pin_factory = before
