"""A demo that is tried: its board, its routes and what its screen shows, with no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import gpiozero
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from device import demo
from device.appliance import Appliance
from device.controls import Facts
from flashd.daemon.jobs import Jobs


class Screen:
    """What the demo shows."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.below = ""

    def say(self, text: str) -> None:
        self.said += text.splitlines()

    def show(self, line: str) -> None:
        self.below = line

    def take_log(self) -> None: ...


class Tried:
    """A demo that is tried."""

    def __init__(self, folder: Path, jobs: Jobs, stack: ExitStack) -> None:
        self.screen = Screen()
        self.demo = demo.Demo(folder, self.screen)
        stack.callback(self.demo.close)
        self.appliance = Appliance(self.demo.settings, jobs, lambda: Facts(demo=True))
        stack.callback(self.appliance.close)
        self.routes: list[Route] = self.demo.routes(self.appliance)
        stack.callback(jobs.close)
        self.appliance.open()
        self.demo.ready()

    def press(self, path: str) -> tuple[int, object]:
        got = TestClient(Starlette(routes=[*self.routes])).post(path)
        return got.status_code, got.json()


@pytest.fixture
def tried(tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tried]:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(demo, "HOLD_SECONDS", 1.2)
    before = gpiozero.Device.pin_factory
    with ExitStack() as stack:
        yield Tried(tmp_path, jobs, stack)
    gpiozero.Device.pin_factory = before
