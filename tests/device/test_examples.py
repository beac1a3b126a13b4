"""The projects in deploy/examples: each is played through with mock pins, and its drawing has its pins."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpiozero
import msgspec
import pytest
from gpiozero.pins.mock import MockFactory

from device.appliance import Appliance
from device.demo import Cable
from flashd.cli.main import main
from flashd.config import settings
from flashd.config.devices import Analog, OneWire
from flashd.daemon.http.api import Api
from flashd.daemon.http.server import Server
from flashd.daemon.job import Job
from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import Mcp3008, Terminal, press
from tests.documents import ROOT, Document
from tests.pictures.example_wirings import DRAWINGS
from tests.pictures.wiring import svg
from tests.waiting import wait

Make = Callable[..., Appliance]
EXAMPLES = ROOT / "deploy" / "examples"
PROJECTS = sorted(path.parent.name for path in EXAMPLES.glob("*/flashd.yaml"))
each = pytest.mark.parametrize("project", PROJECTS)

BUSES = {Analog: {8, 9, 10, 11}, OneWire: {4}}
"""The pins of the buses that sensors hang on."""

UART_RX = 15


def text(project: str) -> str:
    return (EXAMPLES / project / "flashd.yaml").read_text("utf-8")


def speaking(project: str, said: Path) -> str:
    """A project's configuration whose voice writes into a file, a sentence a line."""
    words = text(project)
    assert "[espeak-ng, --stdin]" in words
    return words.replace("[espeak-ng, --stdin]", f"[sh, -c, '{{ cat; echo; }} >> {said}']")


def push(pin: int) -> None:
    """Presses a button by the number of its pin, for longer than it may bounce."""
    press(gpiozero.Device.pin_factory.pin(pin), 0.2)


def asked(job: Job) -> str:
    """The question of a job, without the system prompt."""
    return job.request.turns[-1].content


# --- every project ----------------------------------------------------------------------------------------


def test_there_are_the_projects_that_are_drawn() -> None:
    assert sorted(DRAWINGS) == PROJECTS and len(PROJECTS) == 5


@each
def test_check_config_accepts_it(project: str, tiny_bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    config.write_text(text(project) + f"\nmodel: {tiny_bundle}\n")
    assert main(["check-config", str(config)]) == 0


@each
def test_the_drawing_is_current_and_has_the_pins_of_the_configuration(project: str) -> None:
    drawn = (EXAMPLES / project / "wiring.svg").read_text("utf-8")
    assert drawn == svg(DRAWINGS[project]), "run python -m tests.pictures wirings"
    configured = settings.parse(text(project))
    wanted = set(settings.pins(configured)).union(*(BUSES.get(type(one), set()) for one in configured.sensors))
    if project == "fault-explainer":
        wanted.add(UART_RX)
    assert {int(line) for line in re.findall(r">GPIO([0-9]+) \(", drawn)} == wanted


@each
def test_its_page_has_the_drawing_and_a_bill_of_parts(project: str) -> None:
    page = Document(EXAMPLES / project / "README.md")
    assert "wiring.svg" in page.links
    assert {"parts", "wiring", "try-it", "limits"} <= page.anchors
    assert "| part | pieces |" in page.text


# --- each played through ----------------------------------------------------------------------------------


def test_the_greenhouse_waters_dry_soil_and_no_other(
    appliance: Make, pins: MockFactory, jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even with a model that always says water, as the small default one does."""
    chip = Mcp3008(pins, {0: 410})  # wet: 97.5 %
    caplog.set_level(logging.INFO)
    clerk = Clerk(jobs)
    changed = text("greenhouse").replace("every: 3600", "every: 0.1").replace("most: 20", "most: 0.3")
    appliance(changed.replace("channel: 0,", "channel: 0, timeout: 30,"), sysfs=tmp_path)
    pump = pins.pin(12)

    def looked() -> None:
        """Waits until the soil was looked at twice, and nothing asked."""
        caplog.clear()
        wait(lambda: caplog.text.count("'watering' was not started: its prompt is empty") > 1)

    try:
        push(17)
        wait(lambda: clerk.answered)
        assert "soil moisture is 97.5 % and the air has unknown" in asked(clerk.answered[0])
        looked()
        assert len(clerk.answered) == 1 and not any(state.state for state in pump.states)
        chip.levels = {0: 790}  # dry: 2.5 %
        wait(lambda: pump.state)
        assert asked(clerk.answered[-1]).startswith("The soil is dry.")
        chip.levels = {0: 410}
        looked()
        wait(lambda: not jobs.running and not jobs.waiting and not pump.state)  # its time is up
        decided = len(clerk.answered)
        looked()
        assert len(clerk.answered) == decided and not pump.state
    finally:
        clerk.close()


def test_the_greenhouse_s_fan_runs_once_somebody_says_yes(
    appliance: Make, pins: MockFactory, jobs: Jobs, tmp_path: Path
) -> None:
    folder = tmp_path / "bus/w1/devices/28-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "w1_slave").write_text("f3 01 4b 46 7f ff 0d 10 a1 : crc=a1 YES\nt=31187\n")
    Mcp3008(pins, {0: 410})
    run = ("fan", '{"value": "on", "seconds": 300}')
    clerk, fan = Clerk(jobs, words=["It was hot."], calls=[[("look", '{"sensor": "air"}')], [run]]), pins.pin(16)
    changed = text("greenhouse").replace("press: long\n", "press: long\n    hold: 0.3\n")
    one = appliance(changed, sysfs=tmp_path)
    try:
        press(pins.pin(17), 0.6)
        wait(lambda: one.status().phase == "confirming")
        assert not fan.state
        push(27)
        wait(lambda: clerk.answered)
        assert fan.state
        results = [turn.content for turn in clerk.answered[0].result.steps if turn.role == "tool"]
        assert results == ["31.19 °C", "on for 300 s"] and clerk.answered[0].request.source == "trigger:tend"
    finally:
        clerk.close()


def test_the_talking_button_says_what_was_asked(
    appliance: Make, pins: MockFactory, jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = tmp_path / "said"
    caplog.set_level(logging.INFO)
    clerk = Clerk(jobs, words=["A hen ", "crossed. ", "Ha!"])
    one = appliance(speaking("talking-button", said))
    try:
        push(17)
        wait(lambda: said.exists() and said.read_text().splitlines() == ["A hen crossed.", "Ha!"])
        push(23)
        wait(lambda: len(clerk.answered) == 2 and said.read_text().count("Ha!") == 2)
        assert asked(clerk.answered[1]) == "Say this again in simpler words: A hen crossed. Ha!"
        push(26)
        wait(lambda: one.muted)
        push(27)
        wait(lambda: "'animal' was not started: muted" in caplog.text)
        push(26)
        wait(lambda: not one.muted)
        push(27)
        wait(lambda: len(clerk.answered) == 3 and said.read_text().count("Ha!") == 3)
        assert [job.request.source for job in clerk.answered] == ["trigger:joke", "trigger:simpler", "trigger:animal"]
        assert one.settings.kiosk.questions[0] == asked(clerk.answered[0])  # the page offers the same
    finally:
        clerk.close()


def test_the_door_greets_those_who_come_in_together_once(
    appliance: Make, pins: MockFactory, jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said, door = tmp_path / "said", pins.pin(27)
    caplog.set_level(logging.INFO)
    clerk = Clerk(jobs, words=["Good to ", "see you!"])
    appliance(speaking("door-greeter", said))
    green = pins.pin(20)
    try:
        for _ in range(2):
            door.drive_low()  # the magnet closes the contact
            time.sleep(0.2)
            door.drive_high()
            time.sleep(0.2)
        wait(lambda: "'visitor' was not started: muted, or started a moment ago" in caplog.text)
        wait(lambda: said.exists() and said.read_text() == "Good to see you!\n")
        (greeting,) = [asked(job) for job in clerk.answered]
        assert re.fullmatch(
            r"It is \d\d:\d\d[.] Somebody opens the door[.] Wish a good (morning|afternoon|evening)[.]", greeting
        )
        wait(lambda: green.state)
    finally:
        clerk.close()


def sketch_says(path: Path, **values: str) -> str:
    """The line that a sketch's `ask` prints: its F("...") texts, and a value for each print of a variable."""
    body = path.read_text("utf-8").partition("void ask(")[2].partition("\n}")[0]
    parts = re.findall(r'Serial\.print(?:ln)?\((?:F\((".*?")\)|(\w+).*?)\);$', body, re.MULTILINE)
    return "".join(json.loads(literal) if literal else values[name] for literal, name in parts)


def test_the_logbook_has_an_entry_for_each_line_of_the_sketch(
    appliance: Make, pins: MockFactory, jobs: Jobs, cable: Cable, terminal: Terminal, tmp_path: Path
) -> None:
    book = tmp_path / "logbook.jsonl"
    clerk = Clerk(jobs, words=["It was ", "warm."])
    words = text("field-logbook").replace("/dev/ttyACM0", cable.ours)
    assert "/var/lib/flashd/logbook.jsonl" in words
    appliance(words.replace("/var/lib/flashd/logbook.jsonl", str(book)))
    sketch = EXAMPLES / "field-logbook" / "logbook.ino"
    try:
        assert json.loads(terminal.expect("\n")) == {"event": "ready"}
        for entry in ("1", "2"):
            said = sketch_says(sketch, entry=entry, why="It is time for an entry.", degrees="31.2")
            terminal.type(said + "\r\n")
            terminal.expect('"event":"end"')
            assert '"state":"done"' in terminal.expect("\n")  # what the sketch looks for before it lights its LED
        wait(lambda: book.exists() and book.read_text().count("\n") == 2)
    finally:
        clerk.close()
    entries = [json.loads(entry) for entry in book.read_text().splitlines()]
    assert [entry["result"]["text"] for entry in entries] == ["It was warm."] * 2
    assert entries[0]["request"]["max_tokens"] == 48
    assert "The thermometer shows 31.2 degrees Celsius." in entries[0]["request"]["turns"][-1]["content"]


@pytest.fixture
def environment(jobs: Jobs, tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with the command flashd, whose daemon is at a real socket."""
    command = tmp_path / "bin" / "flashd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flashd "$@"\n')
    command.chmod(0o755)
    server = Server(tmp_path / "api.sock", None)
    api = Api(jobs, "a model", msgspec.Struct, lambda name: pytest.fail(name), lambda: b"", lambda asked, _: asked)
    server.start(api.application([]))
    yield os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}", "FLASHD_SOCKET": str(tmp_path / "api.sock"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    jobs.close()
    server.stop()
    server.close()


def test_a_fault_in_the_machine_s_log_is_explained_once(
    appliance: Make, pins: MockFactory, jobs: Jobs, cable: Cable, terminal: Terminal, tmp_path: Path,
    environment: dict[str, str],
) -> None:  # fmt: skip
    said = tmp_path / "said"
    clerk = Clerk(jobs, words=["The spindle ", "is hot."])
    appliance(speaking("fault-explainer", said))
    program = [sys.executable, str(EXAMPLES / "fault-explainer" / "explain-faults"), cable.ours, "9600"]
    machine = b"N10 G1 X4\r\n\xff\x1b[0mE043 spindle overtemperature\r\n" + b"x" * 5000 + b"\r\n"
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as explainer:
        try:
            assert explainer.stdout is not None
            while not clerk.answered:  # what comes before it listens is lost
                assert explainer.poll() is None
                terminal.type(machine)
                time.sleep(0.2)
            terminal.type(machine + b"E051 door open\r\n")
            wait(lambda: len(clerk.answered) == 2)
            assert explainer.stdout.readline() == "the machine says: \ufffd[0mE043 spindle overtemperature\n"
            assert explainer.stdout.readline() == "The spindle is hot.\n"
            assert "E051" in explainer.stdout.readline()
            wait(lambda: said.read_text().count("The spindle is hot.") == 2)
        finally:
            explainer.terminate()
            clerk.close()
    assert asked(clerk.answered[1]) == "The machine's log says: E051 door open"
