"""What tools do is told to who asks: on a console, over the API, and on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from gpiozero.pins.mock import MockFactory

from device import kiosk
from device.appliance import Appliance
from device.demo import Cable
from flashd.config.settings import parse
from flashd.daemon.http.server import Server
from flashd.daemon.job import Request
from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import Terminal, press
from tests.device.kiosk_page import NEEDED, SETTINGS, Page, api_of
from tests.waiting import wait

Make = Callable[..., Appliance]

TOOLS = """
schemas: true
confirm: {pin: 6}
tools:
  - {kind: time, name: clock, per_minute: 100}
  - {kind: output, name: pump, pin: 8, most: 60, confirm: true, description: Waters.}
"""


def calls_of(request: Request) -> list[str]:
    """The tools that it may call."""
    return [tool.name for tool in request.calling.callable] if request.calling else []


def test_a_console_shows_what_was_done_and_what_it_waits_for(
    appliance: Make, pins: MockFactory, jobs: Jobs, cable: Cable, terminal: Terminal
) -> None:
    line = f"serial: [{{name: console, port: {cable.ours}, tools: [clock, pump], rounds: 1}}]\n"
    line += 'kiosk: {presets: [{prompt: "Late?", tools: [clock], must_call: true}]}\n'
    clerk = Clerk(jobs, calls=[[("clock", "{}"), ("pump", '{"value": "on", "seconds": 9}')]])
    try:
        appliance(TOOLS + line)
        terminal.expect("/help")
        terminal.type("Water!\r")
        terminal.expect("(It looked at the clock: ")
        terminal.expect("(Press the button within 30 s to have it switch the pump on for 9 s.)")
        press(pins.pin(6), 0.2)
        terminal.expect("(It switched the pump on for 9 s.)")
        assert "Press" not in terminal.expect("one two three")
        clerk.calls = []
        terminal.type("Again!\r")  # what was read during the answer is not said behind it
        assert "Press" not in terminal.expect("one two three")
        terminal.type("1\r")
        terminal.expect("one two three")
        requests = [job.request for job in clerk.answered]
        assert [calls_of(request) for request in requests] == [["clock", "pump"], ["clock", "pump"], ["clock"]]
        assert requests[2].calling is not None and requests[2].calling.required
        assert {request.rounds for request in requests} == {1}
    finally:
        clerk.close()


def test_a_client_s_stream_has_what_the_board_did(appliance: Make, jobs: Jobs, tmp_path: Path) -> None:
    """And the board does nothing of what a client calls that has tools of its own, whatever their names."""
    one = appliance(TOOLS + 'kiosk: {tools: [pump], presets: [{prompt: "Late?", tools: [clock]}], rounds: 2}\n')
    clerk = Clerk(jobs, calls=[[("clock", "{}"), ("pump", '{"value": "on"}')]])
    server = Server(tmp_path / "api.sock", None)
    server.start(api_of(one, jobs).application([*kiosk.routes(one)]))
    transport = httpx.HTTPTransport(uds=str(tmp_path / "api.sock"))
    try:
        with httpx.Client(transport=transport, base_url="http://flashd", timeout=60) as http:
            ask: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "Late?"}], "stream": True}
            reply = http.post("/v1/chat/completions", json=ask | {"board_tools": True})
            events = [json.loads(row[6:]) for row in reply.text.splitlines() if row.startswith("data: {")]
            assert calls_of(clerk.answered[0].request) == ["clock"] and clerk.answered[0].request.rounds == 2
            did = [event["flashd"]["did"] for event in events if "did" in event.get("flashd", {})]
            assert did[0].startswith("It looked at the clock: ")
            assert did[1].startswith("It did not do “pump”: you may not use a tool of this name")
            said = [c["delta"].get("content", "") for event in events for c in event["choices"]]
            assert "".join(said) == "one two three"
            pump = {"type": "function", "function": {"name": "clock"}}
            reply = http.post("/v1/chat/completions", json=ask | {"tools": [pump], "stream": False})
            assert reply.json()["choices"][0]["finish_reason"] == "tool_calls"
            job = jobs.get(int(reply.headers["X-Job"]))
            assert job is not None and not job.result.steps
    finally:
        clerk.close()
        jobs.close()
        server.stop()
        server.close()


@pytest.mark.browser
@NEEDED[1]
def test_the_page_shows_what_was_done_and_that_a_press_is_waited_for(
    page: Page, pins: MockFactory, jobs: Jobs
) -> None:
    more = '  - {kind: manual, name: water, prompt: "Water!", tools: [clock, pump]}\n'
    page.appliance.reload(parse(SETTINGS.replace("kiosk: {", "kiosk: {tools: [clock], ") + more + TOOLS))
    clerk = Clerk(jobs, calls=[[("clock", "{}")]])
    try:
        wait(lambda: page.all("#ask"))
        page.ask("Late?")
        wait(lambda: page.text(".answer") == "one two three")
        assert page.text(".did").startswith("It looked at the clock: ")
        clerk.calls = [[("pump", '{"value": "on", "seconds": 9}')]]
        page.appliance.start("water")
        wait(lambda: page.text("#state") == "Press the button?")
        words = "Press the button within 30 s to have it switch the pump on for 9 s."
        wait(lambda: page.text("#notice") == words)
        press(pins.pin(6), 0.2)
        wait(lambda: page.text(".did") == f"{words}\nIt switched the pump on for 9 s.")
        wait(lambda: page.text("#state") == "Ready" and not page.text("#notice"))
    finally:
        clerk.close()
