"""Mock pins for every test, a queue answered by a clerk, and the far end of a serial cable."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpiozero
import pytest
import serial
from gpiozero.pins.mock import MockFactory, MockPin, MockPWMPin, MockSPIDevice, MockTriggerPin

from device.appliance import Appliance
from device.controls import Facts
from device.demo import Cable
from flashd.config.settings import parse
from flashd.daemon.jobs import Jobs
from flashd.daemon.spool import Spool
from tests.daemon.fake_worker import Clerk
from tests.device.kiosk_page import browser, page

__all__ = ["browser", "page"]  # fixtures of the tests with a browser


class Echo:
    """A wall before an ultrasonic ranger, `metres` away; None: the ranger is pulled."""

    def __init__(self, pins: MockFactory, echo: int, trigger: int) -> None:
        pins.pin_class = MockPin  # the mock of a trigger knows no PWM, and all pins must agree
        self._trigger = pins.pin(trigger, pin_class=MockTriggerPin, echo_pin=pins.pin(echo))
        self._echo = self._trigger.echo_pin

    @property
    def metres(self) -> float | None:
        return None if self._trigger.echo_pin is not self._echo else self._trigger.echo_time * SOUND / 2

    @metres.setter
    def metres(self, metres: float | None) -> None:
        self._trigger.echo_pin = _Nowhere() if metres is None else self._echo
        self._trigger.echo_time = 0 if metres is None else 2 * metres / SOUND


class _Nowhere:
    def drive_high(self) -> None: ...

    def drive_low(self) -> None: ...


class Mcp3008(MockSPIDevice):  # type: ignore[misc]
    """The chip on SPI port 0, bit by bit as its data sheet (Microchip DS21295) has it; `levels` of its channels."""

    def __init__(self, pins: MockFactory, levels: dict[int, int]) -> None:
        pins.pin_class = MockPin  # the mock of an SPI clock knows no PWM, and all pins must agree
        gc.collect()  # a bus of an earlier test that goes late takes this one's out of gpiozero's list
        super().__init__(clock_pin=11, mosi_pin=10, miso_pin=9, select_pin=8, pin_factory=pins)
        self.levels = levels

    def on_bit(self) -> None:
        asked = "".join(str(int(bit)) for bit in self.rx_buf).lstrip("0")
        if len(asked) == 5 and asked[1] == "1":  # a start bit, single-ended, then the channel
            sampling_and_null = "00"
            answer = f"{sampling_and_null}{self.levels[int(asked[2:], 2)]:010b}"
            self.tx_buf = [int(bit) for bit in answer]


def press(pin: Any, seconds: float = 0.02) -> None:
    """A button pulls its pin to ground for so long."""
    pin.drive_low()
    time.sleep(seconds)
    pin.drive_high()


SOUND = 343.0
"""Metres a second."""

LAST = {
    "tokens": 3.0, "seconds": 1.5, "first_token_seconds": 0.5, "decode_tokens_per_second": 2.0,
    "card_bytes_per_token": 3 << 20, "window_hit_rate": 0.25,
}  # fmt: skip


@pytest.fixture
def pins() -> Iterator[MockFactory]:
    """gpiozero's own mock of the electronics."""
    before = gpiozero.Device.pin_factory
    factory = gpiozero.Device.pin_factory = MockFactory(pin_class=MockPWMPin)
    yield factory
    factory.reset()
    gpiozero.Device.pin_factory = before


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    spool = Spool(tmp_path / "spool.db", keep=50)
    jobs = Jobs(spool, most_waiting=8)
    yield jobs
    jobs.close()
    spool.close()


@pytest.fixture
def clerk(jobs: Jobs) -> Iterator[Clerk]:
    clerk = Clerk(jobs, words=("It is ", "warm ", "today."))
    yield clerk
    clerk.close()


@pytest.fixture
def appliance(
    pins: MockFactory, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Appliance]]:
    """Makes an open appliance from YAML."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    made: list[Appliance] = []

    def make(text: str, **more: Any) -> Appliance:
        one = Appliance(parse(text), jobs, lambda: Facts(model={"name": "a model"}, last=LAST), **more)
        made.append(one)
        one.open()
        return one

    yield make
    for one in made:
        one.close()


class Terminal:
    """The far end of a cable: what a person types and sees."""

    def __init__(self, port: str) -> None:
        self._line = serial.Serial(port, timeout=0.02)
        self.seen = ""

    def type(self, text: str | bytes) -> None:
        self._line.write(text.encode() if isinstance(text, str) else text)

    def expect(self, text: str, seconds: float = 15.0) -> str:
        """Waits until `text` is on the screen; what came up to it, which is then taken as read."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"{text!r} did not come; there was {self.seen[-2000:]!r}"
            self.seen += self._line.read(4096).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def close(self) -> None:
        self._line.close()


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable()
    yield cable
    cable.close()


@pytest.fixture
def terminal(cable: Cable) -> Iterator[Terminal]:
    terminal = Terminal(cable.theirs)
    yield terminal
    terminal.close()
