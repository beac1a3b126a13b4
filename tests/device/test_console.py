"""A person at the cable: pseudo-terminals joined like a null modem, pyserial at both ends."""

from __future__ import annotations

import logging
import os
import pty
import time
import tty
from collections.abc import Callable
from pathlib import Path

import pytest

from device.appliance import Appliance
from device.consoles import console
from device.consoles.console import Console
from device.consoles.port import MOST_BEHIND
from device.demo import Cable
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.system import board
from tests.daemon.fake_worker import Clerk, request
from tests.device.conftest import Terminal
from tests.waiting import wait

Make = Callable[..., Appliance]

SETTINGS = """
kiosk: {{title: Weather box, presets: ["Is it warm?", "Will it rain?"]}}
serial: [{{name: console, port: {port}{more}}}]
triggers: [{{kind: manual, name: greet, prompt: "Greet."}}, {{kind: manual, name: slow, prompt: p, cooldown: 60}}]
"""


def settings(cable: Cable, more: str = "") -> str:
    return SETTINGS.format(port=cable.ours, more=more)


def test_a_question_is_answered_and_the_talk_remembered(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk
) -> None:
    appliance(settings(cable))
    terminal.expect("Weather box - flashd. /help lists the commands.")
    terminal.expect("2  Will it rain?\r\n")
    terminal.type("Is it warm\x7f\x7f\x7f\x7fcold?\r")
    terminal.expect("It is warm today.\r\n")
    terminal.type("And now?\r")
    terminal.expect("It is warm today.\r\n")
    first, second = clerk.answered
    assert [t.content for t in first.request.turns] == ["Is it cold?"]
    assert [t.content for t in second.request.turns] == ["Is it cold?", "It is warm today.", "And now?"]
    assert second.request.forget  # a long talk must not end in an error
    terminal.type("/reset\r")
    terminal.expect("forgotten")
    terminal.type("1\r")
    terminal.expect("today.")
    assert [t.content for t in clerk.answered[-1].request.turns] == ["Is it warm?"]


def test_whatever_is_typed_leaves_a_console(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk, monkeypatch: pytest.MonkeyPatch
) -> None:
    appliance(settings(cable))
    terminal.expect("2  Will it rain?\r\n")
    for typed in ("0", "3", "99999999999999999999999999"):
        terminal.type(typed + "\r")
        terminal.expect(f"no preset question has the number {typed}; there are 1 to 2\r\n")
    for typed in ("²", "٣"):  # no numbers of a preset, and texts of their own
        terminal.type(typed + "\r")
        terminal.expect("today.")
        assert clerk.answered[-1].request.turns[-1].content == typed
    monkeypatch.setattr(Console, "_ask", lambda self, text: 1 // 0)
    terminal.type("hello\r")
    terminal.expect("Weather box")
    monkeypatch.undo()
    terminal.type("hello\r")
    terminal.expect("today.")


def test_an_empty_enter_greets_whoever_comes_late(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk
) -> None:
    appliance(settings(cable))
    terminal.expect("2  Will it rain?\r\n")
    for typed in ("\r", "   \r"):
        terminal.type(typed)
        terminal.expect(
            "Weather box - flashd. /help lists the commands.\r\n1  Is it warm?\r\n2  Will it rain?\r\n\r> "
        )
    terminal.type("2\r")
    terminal.expect("today.")
    assert [job.request.turns[-1].content for job in clerk.answered] == ["Will it rain?"]


def test_a_long_talk_says_that_it_forgets(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "MOST_TURNS", 4)
    appliance(settings(cable))
    terminal.expect("> ")
    for text in ("one", "two", "three"):
        terminal.type(text + "\r")
        shown = terminal.expect("\r\n\r> \x1b[K")
    assert shown.endswith("It is warm today.\r\n(the older half of this talk is forgotten)\r\n\r> \x1b[K")
    terminal.type("four\r")
    terminal.expect("today.")
    asked = [turn.content for turn in clerk.answered[-1].request.turns]
    assert asked == ["two", "It is warm today.", "three", "It is warm today.", "four"]


def test_a_talk_that_fills_the_context_says_that_it_forgets(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk
) -> None:
    appliance(settings(cable))
    terminal.expect("2  Will it rain?\r\n")
    terminal.type("one\r")
    terminal.expect("today.")
    clerk.forgets = 2
    terminal.type("two\r")
    terminal.expect("today.\r\n(the context is full: the oldest 2 messages are forgotten)\r\n")
    clerk.forgets = 0
    terminal.type("three\r")
    terminal.expect("today.\r\n\r> ")
    asked = [turn.content for turn in clerk.answered[-1].request.turns]
    assert asked == ["two", "It is warm today.", "three"]  # the console does not ask about them again


def test_without_preset_questions_a_number_has_none(appliance: Make, cable: Cable, terminal: Terminal) -> None:
    appliance(f"kiosk: {{title: Box, presets: []}}\nserial: [{{name: console, port: {cable.ours}}}]")
    terminal.expect("> ")
    terminal.type("1\r")
    terminal.expect("no preset question has the number 1; there are none\r\n")


def test_commands(appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk) -> None:
    appliance(settings(cable))
    terminal.expect("2  Will it rain?\r\n")  # what is typed before the port is open is lost
    for typed, seen in (
        ("/help", "Ctrl-C stops an answer"), ("/model", "name: a model"), ("/stats", "3 tokens in 1.5 s"),
        ("/status", "idle, 0 waiting"), ("/nonsense", "/nonsense is not known; /help lists what is"),
        ("/trigger", "there are: greet, slow"), ("/trigger x", "no such trigger"), ("/trigger greet", "today."),
        ("/trigger slow", "today."), ("/trigger slow", "not started"), ("/mute", "muted"),
        ("/mute", "no longer muted"),
    ):  # fmt: skip
        terminal.type(typed + "\r")
        terminal.expect(seen)
        terminal.expect("> ")
    terminal.type("/quit\r")
    terminal.expect("Goodbye")
    terminal.type("\r")
    terminal.expect("Weather box")
    terminal.type("\x04")
    terminal.expect("Goodbye")


def test_status_says_what_holds_the_board_back(
    appliance: Make, cable: Cable, terminal: Terminal, tmp_path: Path
) -> None:
    zone, throttled = tmp_path / "class/thermal/thermal_zone0", tmp_path / board.THROTTLED.replace("*", "")
    for folder in (zone, throttled.parent):
        folder.mkdir(parents=True)
    (zone / "temp").write_text("81000\n")
    throttled.write_text("50005\n")
    appliance(settings(cable), sysfs=tmp_path)
    terminal.expect("2  Will it rain?\r\n")
    terminal.type("/status\r")
    terminal.expect("processor 81 °C\r\nprocessor slowed: too hot, or too weak a supply\r\n")


def test_ctrl_c_stops_an_answer(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    appliance(settings(cable))
    clerk = Clerk(jobs, words=["word "] * 100, paced=True)
    assert clerk.permits is not None
    terminal.type("talk\r")
    clerk.permits.release(3)
    terminal.expect("word word")
    terminal.type("\x03")
    terminal.expect("(stopped)")
    clerk.close()
    assert jobs.recent(1)[0].state is State.CANCELLED


def test_while_nothing_has_come_a_row_says_why(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    appliance(settings(cable))
    clerk = Clerk(jobs, paced=True)
    assert clerk.permits is not None
    terminal.type("hello\r")
    terminal.expect("thinking, 1 s")
    (running,) = jobs.running
    jobs.progress(running, 7, 28, 130 << 20)
    terminal.expect("thinking, layer 7 of 28, 130 MiB read, ")
    clerk.permits.release(3)
    # the row is taken away before the answer
    assert terminal.expect("one two three").endswith("\r\x1b[Kone two three")
    clerk.close()


def test_what_is_typed_during_an_answer_is_asked_afterwards(
    appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs
) -> None:
    appliance(settings(cable))
    clerk = Clerk(jobs, paced=True)
    assert clerk.permits is not None
    terminal.type("first\r")
    wait(lambda: jobs.running)
    terminal.type("second\r")
    time.sleep(0.2)
    clerk.permits.release(6)
    terminal.expect("three")
    terminal.expect("second")
    terminal.expect("three")
    clerk.close()
    assert [j.request.turns[-1].content for j in clerk.answered] == ["first", "second"]


def test_what_comes_in_one_read_is_taken_line_by_line(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk
) -> None:
    appliance(settings(cable))
    terminal.expect("2  Will it rain?\r\n")
    terminal.type("\rIs it warm?\rAnd n")
    terminal.expect("\r> \x1b[K\r\n\r\nWeather box")
    terminal.expect("2  Will it rain?\r\n\r> \x1b[KIs it warm?\r\nIt is warm today.\r\n\r> \x1b[KAnd n")
    terminal.type("ow?\r")
    terminal.expect("ow?\r\nIt is warm today.\r\n")
    assert [job.request.turns[-1].content for job in clerk.answered] == ["Is it warm?", "And now?"]


def test_who_waits_sees_his_place(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    appliance(settings(cable))
    first = jobs.submit(request(priority=9))
    terminal.expect("> ")
    terminal.type("hello\r")
    terminal.expect("waiting, 1 before you, ")
    clerk = Clerk(jobs)
    terminal.expect("one two three")
    clerk.close()
    assert clerk.answered[0].id == first.id


def test_ascii_and_narrow(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    appliance(settings(cable, ", charset: ascii, columns: 20"))
    clerk = Clerk(jobs, words=["Tous les ", "garçons — et ", "les filles… 25 °C"])
    terminal.expect("> ")
    terminal.type("x\r")
    answer = terminal.expect("deg C").partition("x\r\n")[2]
    clerk.close()
    assert answer == "Tous les garcons -\r\net les filles... 25\r\ndeg C"


def test_text_is_paced_to_the_line(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    """At 1,200 baud 120 characters take a second: of a long answer only a little is out when Ctrl-C comes."""
    appliance(settings(cable, ", baud: 1200"))
    terminal.expect("> ")
    clerk = Clerk(jobs, words=["0123456789" * 200])
    terminal.type("x\r")
    terminal.expect("0123456789")
    wait(lambda: not jobs.running)
    terminal.type("\x03")
    time.sleep(0.5)
    terminal.expect("> ", 20)
    clerk.close()


def test_an_end_that_holds_the_line_up_is_waited_for(
    appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """XOFF, then more than is kept: the session stays, what is over is dropped, and XON lets the rest come."""
    appliance(settings(cable, ", flow: xonxoff, baud: 4000000"))
    terminal.expect("> ")
    clerk = Clerk(jobs, words=[f"{i:06} " for i in range(MOST_BEHIND // 7 + 2000)])
    terminal.type("x\r")
    terminal.expect("000009")
    terminal.type(b"\x13")
    wait(lambda: "the other end takes nothing" in caplog.text, 30)
    wait(lambda: not jobs.running, 30)
    clerk.close()
    terminal.type(b"\x11/status\r")
    terminal.expect("idle, 0 waiting", 30)
    assert "gone" not in caplog.text


def test_garbage_a_megabyte_and_breaks(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk, caplog: pytest.LogCaptureFixture
) -> None:
    appliance(settings(cable))
    terminal.expect("> ")
    terminal.type(bytes(range(128, 256)) + b"\0\0\x1b[99;99;99;99z\x1b[A\x1bOx")
    terminal.type(b"\x15")
    for _ in range(64):
        terminal.type(b"x" * (1 << 14))
        terminal.seen += terminal._line.read(1 << 16).decode("utf-8", "replace")
    terminal.type(b"\x15")
    terminal.type(b"\x0b\r")
    terminal.type("still there?\r")
    terminal.expect("It is warm today.", 60)
    assert clerk.answered[-1].request.turns[-1].content == "still there?"
    for what in ("a break, or noise, on the line", "bytes that are not UTF-8", "a line of more than 4096 characters"):
        assert caplog.text.count(what) == 1, what


def test_an_adapter_that_is_pulled_and_put_back(
    appliance: Make, jobs: Jobs, clerk: Clerk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    link = tmp_path / "ttyUSB0"
    appliance(f"serial: [{{name: console, port: {link}}}]")
    wait(lambda: "waiting for it" in caplog.text)
    for _ in range(2):
        master, slave = pty.openpty()
        tty.setraw(slave)
        link.symlink_to(os.ttyname(slave))
        os.close(slave)
        seen = b""
        until = time.monotonic() + 10
        while b"/help lists" not in seen and time.monotonic() < until:
            try:
                seen += os.read(master, 4096)
            except OSError:  # nobody has opened it yet
                time.sleep(0.05)
        assert b"/help lists" in seen
        link.unlink()
        os.close(master)
        wait(lambda: "gone" in caplog.text)
        caplog.clear()
