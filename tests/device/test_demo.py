"""The demo's routes: a finger on a mock pin."""

from __future__ import annotations

import gpiozero
import pytest
from gpiozero.pins.mock import MockFactory
from starlette.applications import Starlette
from starlette.testclient import TestClient

from device import demo


@pytest.mark.parametrize(
    ("pin", "status", "answer"),
    [
        (17, 200, {"pressed": 17}),
        (99, 404, {"error": "there is no pin 99"}),
        (22, 404, {"error": "pin 22 is an output; only a pin with a button or a contact can be pressed"}),
    ],
)
def test_a_pin_is_pressed_or_it_is_said_why_not(
    pin: int, status: int, answer: dict[str, object], pins: MockFactory
) -> None:
    with gpiozero.Button(17), gpiozero.LED(22):
        got = TestClient(Starlette(routes=[*demo.routes()])).post(f"/demo/press/{pin}")
    assert (got.status_code, got.json()) == (status, answer)
