"""LEDs, buzzer, speech, display and hooks, each through its real interface; pins that decisions drive."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from gpiozero import BadPinFactory
from gpiozero.pins.mock import MockFactory

from device import drives
from device.appliance import Appliance
from device.outputs import kinds
from device.outputs.display import Screen
from device.outputs.output import InTurn, Output, Phase
from device.outputs.panel import Panel
from flashd.cli.main import main
from flashd.config.devices import AnyOutput, Display
from flashd.config.settings import parse
from flashd.daemon.job import Event, Job, State
from flashd.daemon.jobs import Jobs
from flashd.errors import CannotWrite, ConfigError
from flashd.system.new_file import NewFile
from tests.daemon.fake_worker import Clerk, request
from tests.waiting import wait

Make = Callable[..., Appliance]


def test_an_led_shows_each_phase(pins: MockFactory, jobs: Jobs) -> None:
    panel = Panel(parse("outputs: [{kind: led, pin: 3}, {kind: rgb, red: 4, green: 5, blue: 6}]").outputs, jobs)
    red, green, blue = (pins.pin(n) for n in (4, 5, 6))

    def colour() -> tuple[int, ...]:
        return tuple(int(p.state) for p in (red, green, blue))

    def shows(phase: Phase, *rgb: int) -> bool:
        return panel.phase is phase and colour() == rgb

    assert shows(Phase.LOADING, 1, 1, 0)
    panel.ready()
    assert shows(Phase.IDLE, 0, 1, 0)
    jobs.submit(request())
    job = jobs.take(0)
    assert job is not None
    wait(lambda: shows(Phase.THINKING, 0, 0, 1))
    jobs.say(job, "word")
    wait(lambda: shows(Phase.ANSWERING, 0, 1, 1))
    assert pins.pin(3).state == 1  # lit while it answers
    jobs.finish(job, State.FAILED, "the card failed")
    wait(lambda: shows(Phase.ERROR, 1, 0, 0))
    panel.ready()
    panel.mute(True)
    assert shows(Phase.MUTED, 0, 0, 0)
    panel.close()


def test_a_buzzer_beeps_for_an_answer(pins: MockFactory, jobs: Jobs, clerk: Clerk) -> None:
    panel = Panel(parse("outputs: [{kind: buzzer, pin: 3}]").outputs, jobs)
    panel.ready()
    pin = pins.pin(3)
    pin.clear_states()
    jobs.submit(request())
    wait(lambda: [s.state for s in pin.states].count(True) == 1 and not pin.state)
    panel.close()


def speaker(tmp_path: Path) -> tuple[Path, str]:
    """A program that says what it is given into a file."""
    program, said = tmp_path / "say", tmp_path / "said"
    program.write_text(f"#!/bin/sh\ncat >> {said}\necho >> {said}\n")
    program.chmod(0o755)
    return said, f"outputs: [{{kind: speech, command: [{program}]}}]"


def test_speech_says_sentence_by_sentence(tmp_path: Path, jobs: Jobs) -> None:
    said, text = speaker(tmp_path)
    panel = Panel(parse(text).outputs, jobs)
    clerk = Clerk(jobs, words=["It is 21.5 deg", "rees. Take", " a coat", "! Bye"], paced=True)
    assert clerk.permits is not None
    jobs.submit(request())
    clerk.permits.release(3)
    wait(lambda: said.exists() and "degrees." in said.read_text())
    clerk.permits.release(1)
    wait(lambda: said.read_text().splitlines() == ["It is 21.5 degrees.", "Take a coat!", "Bye"])
    clerk.close()
    panel.close()


def happens(kind: str, job: int, text: str = "") -> Event:
    if kind in ("done", "cancelled", "failed"):
        ended = Job(id=job, request=request(), created=0.0, state=State(kind))
        return Event(kind="ended", job=job, end=ended)
    return Event(kind=kind, job=job, text=text)  # type: ignore[arg-type]


def followed(*events: Event) -> list[str]:
    turns = InTurn()
    return [f"{e.job} {e.end.state if e.end else e.text or e.kind}" for event in events for e in turns.take(event)]


def test_answers_that_come_together_are_followed_one_by_one() -> None:
    assert followed(
        happens("started", 1), happens("started", 2), happens("text", 2, "b"), happens("text", 1, "a"),
        happens("done", 2), happens("text", 1, "A"), happens("done", 1), happens("started", 3),
        happens("text", 3, "c"),
    ) == ["1 started", "1 a", "1 A", "1 done", "2 started", "2 b", "2 done", "3 started", "3 c"]  # fmt: skip


@pytest.mark.parametrize("kind", ["cancelled", "failed", "restarted"])
def test_what_came_to_no_answer_behind_another_is_left_out(kind: str) -> None:
    events = [happens("started", 1), happens("started", 2), happens("text", 2, "b"), happens(kind, 2)]
    assert followed(*events, happens("text", 1, "a"), happens("done", 1)) == ["1 started", "1 a", "1 done"]
    # one that only waited silences nobody
    assert followed(happens("started", 1), happens("cancelled", 2)) == ["1 started"]
    # and behind the first one that broke off the next goes on
    assert (
        followed(happens("started", 1), happens("started", 2), happens(kind, 1), happens("text", 2, "b"))[-1] == "2 b"
    )


def test_it_shows_that_it_thinks_as_long_as_one_of_several_does(pins: MockFactory, jobs: Jobs) -> None:
    panel = Panel([], jobs)
    panel.ready()
    one, two = jobs.submit(request()), jobs.submit(request())
    assert jobs.take(1) is not None and jobs.take_beside(two)
    wait(lambda: panel.phase is Phase.THINKING)
    jobs.finish(one, State.DONE, "stop")
    jobs.say(two, "Yes")
    wait(lambda: panel.phase is Phase.ANSWERING)
    jobs.finish(two, State.DONE, "stop")
    wait(lambda: panel.phase is Phase.IDLE)
    panel.close()


def test_every_kind_of_output_has_what_opens_it() -> None:
    assert set(kinds.KINDS) == set(get_args(AnyOutput))


class _Loose(Output):
    """Nothing answers on its wires, from the second phase on."""

    shown = 0

    def show(self, _phase: Phase) -> None:
        self.shown += 1
        if self.shown > 1:
            raise OSError("Remote I/O error")


def test_an_output_that_fails_leaves_the_others_going(
    pins: MockFactory, jobs: Jobs, clerk: Clerk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(kinds.KINDS, Display, lambda settings, around: _Loose())
    panel = Panel(parse("outputs: [{kind: display}, {kind: led, pin: 2}]").outputs, jobs)
    panel.ready()
    for _ in range(2):
        _, watch = jobs.ask(request())
        list(watch)
    wait(lambda: panel.phase is Phase.IDLE)
    panel.close()
    assert len([r for r in caplog.records if "an output failed" in r.message]) == 1


@pytest.mark.display
def test_a_display_that_is_not_there_is_left_out(
    appliance: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("luma.oled")
    one = appliance("outputs: [{kind: display, port: 63}]\ntriggers: [{kind: manual, name: greet, prompt: p}]")
    assert "display ssd1306 on I2C bus 63: " in caplog.text and "left out" in caplog.text
    assert one.start("greet").id == 1


def test_what_a_sentence_starts_goes_before_the_daemon_where_memory_is_short(tmp_path: Path, jobs: Jobs) -> None:
    said = tmp_path / "said"
    command = f"sleep 0.2; cat /proc/self/oom_score_adj > {said}"
    panel = Panel(parse(f"outputs: [{{kind: speech, command: [sh, -c, '{command}']}}]").outputs, jobs)
    clerk = Clerk(jobs, words=["Good morning."])
    jobs.submit(request())
    wait(lambda: said.exists() and said.read_text() == "1000\n")
    clerk.close()
    panel.close()


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs Debian's espeak-ng")
def test_espeak_says_it(tmp_path: Path, jobs: Jobs) -> None:
    sound = tmp_path / "sound.wav"
    panel = Panel(parse(f"outputs: [{{kind: speech, command: [espeak-ng, --stdin, -w, {sound}]}}]").outputs, jobs)
    clerk = Clerk(jobs, words=["Good morning."])
    jobs.submit(request())
    wait(lambda: sound.exists() and sound.stat().st_size > 10_000)
    clerk.close()
    panel.close()
    assert sound.read_bytes()[:4] == b"RIFF"


class Seen(Output):
    """Counts the jobs whose end all outputs before it have heard of."""

    ended = 0

    def event(self, event: Event) -> None:
        self.ended += event.end is not None


def test_what_comes_while_it_is_muted_is_not_said(tmp_path: Path, jobs: Jobs) -> None:
    said, text = speaker(tmp_path)
    panel, seen = Panel(parse(text).outputs, jobs), Seen()
    panel._outputs.append(seen)
    clerk = Clerk(jobs, words=["A sentence. ", "More"])
    for times, muted in enumerate((True, False)):
        panel.mute(muted)
        jobs.submit(request())
        wait(lambda times=times: seen.ended == times + 1)  # type: ignore[misc]
    wait(lambda: said.exists() and "More" in said.read_text())
    clerk.close()
    panel.close()
    assert said.read_text().count("sentence") == 1


def test_a_cancelled_answer_falls_silent_at_once(tmp_path: Path, jobs: Jobs) -> None:
    """The whole pipe of a shell, such as piper's into aplay."""
    alive = tmp_path / "alive"
    text = f"outputs: [{{kind: speech, command: [sh, -c, 'cat | (echo $$ > {alive}; sleep 600)']}}]"
    panel = Panel(parse(text).outputs, jobs)
    clerk = Clerk(jobs, words=["A sentence. ", "More. ", "And more."], paced=True)
    assert clerk.permits is not None
    job = jobs.submit(request())
    clerk.permits.release(2)
    wait(lambda: alive.exists() and alive.read_text().strip())
    jobs.cancel(job.id)
    group = int(alive.read_text())
    wait(lambda: not running(group))
    clerk.close()
    panel.close()


def test_a_press_or_the_next_answer_stops_what_is_said(tmp_path: Path, jobs: Jobs) -> None:
    """Sentences of an answer that still comes are not said either. Without a press, nothing of it is lost."""
    said, slow = tmp_path / "said", tmp_path / "say"
    slow.write_text(f"#!/bin/sh\nread line; echo $line >> {said}\ncase $line in S*) sleep 600;; esac\n")
    slow.chmod(0o755)

    def lines() -> list[str]:
        return said.read_text().splitlines() if said.exists() else []

    panel = Panel(parse(f"outputs: [{{kind: speech, command: [{slow}]}}]").outputs, jobs)
    clerk = Clerk(jobs, words=["Slow. ", "More. ", "Rest. ", "End."], paced=True)
    assert clerk.permits is not None
    _, watch = jobs.ask(request())
    clerk.permits.release(2)
    wait(lambda: lines() == ["Slow."])
    panel.hush()  # a press, in the middle of the answer
    clerk.permits.release(2)
    list(watch)
    jobs.submit(request())
    clerk.permits.release(4)
    wait(lambda: lines() == ["Slow.", "Slow."])
    wait(lambda: not jobs.running)
    jobs.submit(request())  # the next answer
    clerk.permits.release(4)
    wait(lambda: lines() == ["Slow.", "Slow.", "Slow."])
    panel.mute(True)
    time.sleep(0.1)
    assert lines() == ["Slow."] * 3
    clerk.close()
    panel.close()


def test_a_press_of_a_button_stops_what_is_said(
    tmp_path: Path, pins: MockFactory, appliance: Make, jobs: Jobs
) -> None:
    """It does so when it goes down, and whatever press it will be; with until: end it does not."""
    alive = [tmp_path / "a", tmp_path / "b"]
    outputs = ", ".join(
        f"{{kind: speech, until: {until}, command: [sh, -c, 'echo $$ > {path}; sleep 600']}}"
        for path, until in zip(alive, ("press", "end"), strict=True)
    )
    trigger = "{kind: button, name: b, pin: 4, press: long, bounce: 0, prompt: p}"
    appliance(f"triggers: [{trigger}]\noutputs: [{outputs}]")
    clerk = Clerk(jobs, words=["A sentence. ", "More."])
    jobs.submit(request())
    wait(lambda: all(path.exists() and path.read_text().strip() for path in alive))
    wait(lambda: not jobs.running)
    stopped, goes_on = (int(path.read_text()) for path in alive)
    jobs.submit(request())
    wait(lambda: len(clerk.answered) == 2)
    assert running(stopped)
    pins.pin(4).drive_low()
    wait(lambda: not running(stopped))
    assert running(goes_on)
    clerk.close()


def running(group: int) -> list[str]:
    """The programs of a session."""
    stats = [_text(path).rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [fields[0] for fields in stats if fields and int(fields[3]) == group and fields[0] != "Z"]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


def test_what_is_not_installed_is_said_once(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    panel = Panel(parse("outputs: [{kind: speech, command: [none-such]}]").outputs, jobs)
    clerk = Clerk(jobs, words=["One. ", "Two. ", "Three."])
    _, watch = jobs.ask(request())
    list(watch)
    wait(lambda: "none-such" in caplog.text)
    time.sleep(0.2)
    clerk.close()
    panel.close()
    assert caplog.text.count("none-such") == 1


def test_a_voice_that_fails_is_said_once(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    panel = Panel(parse("outputs: [{kind: speech, command: [sh, -c, 'cat; exit 3']}]").outputs, jobs)
    clerk = Clerk(jobs, words=["One. ", "Two. ", "Three."])
    jobs.submit(request())
    wait(lambda: "speech: sh ended with 3; flashd doctor looks at the sound card" in caplog.text)
    clerk.close()
    panel.close()
    assert caplog.text.count("ended with 3") == 1


def test_a_voice_that_fails_now_and_then_is_said_once(
    tmp_path: Path, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that is killed from outside is a voice that failed too."""
    said = tmp_path / "said"
    script = f"read line; echo >> {said}; case $line in O*) exit 3;; K*) kill -9 $$;; esac"
    panel = Panel(parse(f"outputs: [{{kind: speech, command: [sh, -c, '{script}']}}]").outputs, jobs)
    clerk = Clerk(jobs, words=["One. ", "Two. ", "One. ", "Kill. ", "Two. ", "Kill. ", "Two."])
    jobs.submit(request())
    wait(lambda: said.exists() and len(said.read_text()) == 7)
    clerk.close()
    panel.close()
    assert caplog.text.count("speech: sh ended with 3") == 1 and caplog.text.count("speech: sh ended with -9") == 1


def test_a_hook_that_takes_too_long_ends_with_all_it_started(
    tmp_path: Path, jobs: Jobs, clerk: Clerk, caplog: pytest.LogCaptureFixture
) -> None:
    alive = tmp_path / "alive"
    command = f"[sh, -c, 'echo $$ > {alive}; sleep 600 | cat']"
    panel = Panel(parse(f"outputs: [{{kind: hook, timeout: 0.5, command: {command}}}]").outputs, jobs)
    jobs.submit(request())
    wait(lambda: "timed out" in caplog.text)
    wait(lambda: not running(int(alive.read_text())))
    panel.close()


def test_a_hook_is_given_the_job(tmp_path: Path, jobs: Jobs, clerk: Clerk) -> None:
    program, got = tmp_path / "hook", tmp_path / "got"
    program.write_text(f"#!/bin/sh\ncat > {got}.part && mv {got}.part {got}\n")
    program.chmod(0o755)
    panel = Panel(parse(f"outputs: [{{kind: hook, event: done, command: [{program}]}}]").outputs, jobs)
    jobs.submit(request("why?"))
    wait(got.exists)
    job = json.loads(got.read_text())
    assert job["state"] == "done" and job["result"]["text"] == "It is warm today."
    panel.close()


@pytest.mark.display
def test_a_display_shows_the_answer(jobs: Jobs) -> None:
    """luma's own dummy device draws into an image."""
    luma = pytest.importorskip("luma.core.device")

    screen = luma.dummy(width=128, height=64, mode="1")
    display = Screen(screen)
    display.show(Phase.THINKING)
    blank = screen.image.tobytes()
    for event in (happens("started", 1), happens("text", 1, "Hello")):
        display.event(event)
    assert screen.image.tobytes() != blank and screen.image.getbbox() is not None


DECIDES = """
triggers:
  - {kind: manual, name: plants, prompt: p, choose: [water, wait], drive: {pin: 8, answer: water, most: 0.3}}
"""


def test_a_decision_drives_its_pin_for_a_bounded_time(pins: MockFactory, appliance: Make, jobs: Jobs) -> None:
    one = appliance(DECIDES)
    clerk = Clerk(jobs)  # it always takes the first choice
    pin = pins.pin(8)
    assert not pin.state
    one.start("plants")
    # however late this thread looks, the pin has been on and is off again
    wait(lambda: [state.state for state in pin.states][-2:] == [True, False])
    clerk.close()


def test_a_pin_that_cannot_be_let_go_leaves_no_other_on(
    pins: MockFactory, appliance: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    second = "  - {kind: manual, name: fan, prompt: p, choose: [on, off], drive: {pin: 9, answer: 'on', most: 60}}\n"
    one: Any = appliance(DECIDES + second.replace("[on, off]", "['on', 'off']"))
    drives = one._drives._drives
    for drive in drives.values():
        drive.set(True)
    assert pins.pin(8).state and pins.pin(9).state

    def busy() -> None:
        raise RuntimeError("GPIO busy")  # lgpio's own errors are of no better kind

    monkeypatch.setattr(drives["trigger:plants"]._pin, "close", busy)
    one._drives.close()
    assert not pins.pin(8).state and not pins.pin(9).state
    assert "a pin was not let go" in caplog.text and "GPIO busy" in caplog.text


@pytest.mark.parametrize("how", ["cancelled", "another answer", "closed", "reloaded"])
def test_a_pin_is_off_after_anything_else(how: str, pins: MockFactory, appliance: Make, jobs: Jobs) -> None:
    one: Any = appliance(DECIDES.replace("0.3", "60"))
    pin = pins.pin(8)

    def answer(state: State, text: str) -> None:
        one.start("plants")
        job = jobs.take(1)
        assert job is not None
        jobs.say(job, text)
        jobs.finish(job, state, "stop")

    answer(State.DONE, "water")
    wait(lambda: pin.state)
    if how == "cancelled":
        answer(State.CANCELLED, "water")
    elif how == "another answer":
        answer(State.DONE, "wait")
    elif how == "closed":
        one.close()
    else:
        one.reload(parse(DECIDES))
    wait(lambda: not pin.state)


@pytest.mark.parametrize("active_high", [True, False])
def test_safe_turns_pins_off_after_a_crash(active_high: bool, pins: MockFactory, tmp_path: Path) -> None:
    """Without a record, as an older daemon leaves it, the configuration's."""
    pin = left_on(pins, 8, active_high)
    config = tmp_path / "flashd.yaml"
    drives = DECIDES.replace("most:", f"active_high: {str(active_high).lower()}, most:")
    config.write_text(f"spool: {{path: {tmp_path}/spool.db}}{drives}")
    assert main(["safe", "--config", str(config)]) == 0
    assert levels(pin) == [active_high, not active_high]


def left_on(pins: MockFactory, number: int, level: bool = True) -> Any:
    """A pin as a daemon left it that was killed."""
    pin = pins.pin(number)
    pin.function, pin.state = "output", level
    pin.clear_states()
    return pin


def test_safe_says_that_there_are_no_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_factory(*_: Any, **__: Any) -> Any:
        raise BadPinFactory("Unable to load any default pin factory!")

    monkeypatch.setattr(
        drives, "gpiozero", SimpleNamespace(BadPinFactory=BadPinFactory, DigitalOutputDevice=no_factory)
    )
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    (tmp_path / "pins.json").write_text('[{"pin": 8, "active_high": true}]')
    assert main(["safe", "--config", str(tmp_path / "none.yaml")]) != 0
    assert "no pins can be used here" in capsys.readouterr().err and (tmp_path / "pins.json").exists()


def somebody_has(pins: MockFactory, number: int, context: pytest.MonkeyPatch) -> None:
    """A pin that another process holds: lgpio's error of it gpiozero does not make its own."""

    class Busy(Exception): ...

    real = pins.pin

    def pin(name: int, *more: Any, **other: Any) -> Any:
        if str(name).removeprefix("GPIO") == str(number):
            raise Busy("GPIO busy")
        return real(name, *more, **other)

    context.setattr(pins, "pin", pin)


@pytest.mark.parametrize("what", ["drive", "button", "led", "mute"])
def test_a_reload_with_a_pin_that_somebody_has_leaves_all_as_it_was(
    what: str, pins: MockFactory, appliance: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = appliance(DECIDES)
    somebody_has(pins, 9, monkeypatch)
    other = {
        "drive": DECIDES.replace("pin: 8", "pin: 9"),
        "button": "triggers: [{kind: button, name: front, pin: 9, prompt: p}]",
        "led": "outputs: [{kind: led, pin: 9}]",
        "mute": "mute_pin: 9",
    }[what]
    with pytest.raises(ConfigError, match="GPIO busy"):
        one.reload(parse(other))
    assert one.settings == parse(DECIDES) and one.start("plants").id == 1


def levels(pin: Any) -> list[bool]:
    """What was on it, up to when it floats again."""
    return [bool(s.state) for s in pin.states][:2]


def test_the_record_of_pins_is_as_long_there_as_they_are_held(
    pins: MockFactory, appliance: Make, tmp_path: Path
) -> None:
    record = tmp_path / "pins.json"
    one = appliance(DECIDES)
    assert json.loads(record.read_bytes()) == [{"pin": 8, "active_high": True}]
    one.reload(parse(DECIDES.replace("pin: 8", "active_high: false, pin: 9")))
    assert json.loads(record.read_bytes()) == [{"pin": 9, "active_high": False}]
    one.reload(parse(""))
    assert not record.exists()
    one.reload(parse(DECIDES))
    assert record.exists()
    one.close()
    assert not record.exists()


def test_no_pin_is_taken_that_cannot_be_written_down(
    pins: MockFactory, appliance: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = left_on(pins, 8)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "none"))
    with pytest.raises(CannotWrite, match=r"pins\.json"):
        appliance(DECIDES)
    assert levels(pin) == [True]


def test_a_reload_on_a_full_disk_leaves_pins_as_they_were(
    pins: MockFactory, appliance: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, data: bytes, offset: int) -> None:
        raise CannotWrite("pins.json: No space left on device")

    one, other = appliance(DECIDES), parse(DECIDES.replace("pin: 8", "pin: 9"))
    monkeypatch.setattr(NewFile, "write", full)
    one.reload(parse(DECIDES))
    with pytest.raises(CannotWrite, match="No space"):
        one.reload(other)
    assert one.settings == parse(DECIDES) and pins.pin(8).function == "output"
    assert json.loads((tmp_path / "pins.json").read_bytes()) == [{"pin": 8, "active_high": True}]


def test_safe_turns_off_all_that_it_can(
    pins: MockFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And keeps the record while a pin of it may be on."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    record = tmp_path / "pins.json"
    record.write_text('[{"pin": 8, "active_high": true}, {"pin": 9, "active_high": false}]')
    pin = left_on(pins, 9, False)
    safe = ["safe", "--config", str(tmp_path / "none.yaml")]
    with monkeypatch.context() as context:
        somebody_has(pins, 8, context)
        assert main(safe) != 0
        assert "pin 8" in capsys.readouterr().err
    assert levels(pin) == [False, True] and record.exists()
    assert main(safe) == 0 and not record.exists()
    for rot in (b"[{", b'[{"pin\xff":8}]'):
        record.write_bytes(rot)
        assert main(safe) == os.EX_DATAERR
