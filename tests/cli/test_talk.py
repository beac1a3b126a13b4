"""The talk of a person at a terminal."""

from __future__ import annotations

import io
import os
import pty
import shlex
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from itertools import pairwise
from pathlib import Path

import pexpect
import pytest

from flashd.cli.commands import ask_daemon
from flashd.cli.options import Chat
from flashd.cli.parser import parse
from flashd.cli.talking.said import Said
from flashd.cli.talking.talk import GREETING, MOST_TURNS, Talk, Turns, Welcome
from flashd.daemon.job import Request, Result, State, Turn
from flashd.daemon.spool import Spool
from flashd.errors import DataError
from flashd.system.printable import plain_output
from tests.cli.command import FLASHD, run
from tests.waiting import wait

PATIENCE = 180.0
"""Seconds that a busy machine may take."""


class Asker:
    """Somebody who asks the same again and again."""

    def __init__(self, lines: list[str]) -> None:
        self._lines, self.notes, self.greeted = iter(lines), list[str](), list[str]()

    def next_line(self) -> str | None:
        return next(self._lines, None)

    def answer(self, said: Said, work: Callable[[], None]) -> None:  # noqa: ARG002
        work()

    def say(self, piece: str) -> None:  # noqa: ARG002
        raise AssertionError("nobody calls this")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def greet(self, text: str) -> None:
        self.greeted.append(text)


def test_whoever_comes_late_is_shown_what_a_number_asks() -> None:
    """And a number is an answer to the model once the talk has begun."""
    asked: list[str] = []

    def answer(turns: Turns, said: Said) -> None:
        asked.append(turns[-1][1])
        said.text = "Guess my number."

    options = parse(["chat"])
    assert isinstance(options, Chat)
    asker = Asker(["", "3", "0", "2", "7", "/reset", "1", "1e3"])
    Talk(asker, options, answer, lambda: Welcome("Greenhouse", ("Is it warm?", "Guess?"))).run()
    shown = f"Greenhouse - flashd\n1  Is it warm?\n2  Guess?\n{GREETING}"
    assert asker.greeted == [shown, shown]
    assert asker.notes == [f"no preset question has the number {n}; there are 1 to 2" for n in (3, 0)]
    assert asked == ["Guess?", "7", "Is it warm?", "1e3"]


def test_a_daemon_that_loads_keeps_nobody_from_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket takes a client, and no answer comes yet."""
    monkeypatch.setattr(ask_daemon, "WELCOME_SECONDS", 0.05)
    monkeypatch.setenv("FLASHD_SOCKET", str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "s"))
        held.listen()
        assert ask_daemon._welcome() == Welcome()


def test_with_no_presets_a_number_is_a_question() -> None:
    asked: list[str] = []
    options = parse(["chat"])
    assert isinstance(options, Chat)
    asker = Asker(["42"])
    Talk(asker, options, lambda turns, said: asked.append(turns[-1][1])).run()
    assert asked == ["42"] and asker.greeted == [GREETING]


def test_of_a_long_talk_much_is_forgotten_at_once() -> None:
    """So that questions begin alike for some time, and their KV cache is kept."""
    asked: list[int] = []

    def answer(turns: Turns, said: Said) -> None:
        asked.append(len(turns))
        said.text = "yes"

    options = parse(["chat", "--system", "Be brief."])
    assert isinstance(options, Chat)
    asker = Asker(["hello"] * 80)
    Talk(asker, options, answer).run()
    assert max(asked) == MOST_TURNS + 2  # with the system's words and the question
    times = sum(later < earlier for earlier, later in pairwise(asked))
    assert 1 <= times <= 3 and asker.notes == ["(the older half of this talk is forgotten)"] * times


def test_a_question_that_came_to_no_answer_is_no_part_of_the_talk() -> None:
    asked: list[list[str]] = []

    def answer(turns: Turns, said: Said) -> None:
        asked.append([text for _, text in turns])
        if len(asked) == 1:
            raise DataError("the card is gone")
        said.stopped, said.text = True, ("", "half", "whole")[len(asked) - 2]

    options = parse(["chat"])
    assert isinstance(options, Chat)
    asker = Asker(["a", "b", "c", "d"])
    Talk(asker, options, answer).run()
    assert asked == [["a"], ["b"], ["c"], ["c", "half", "d"]]
    assert asker.notes == ["flashd: the card is gone", *["(stopped)"] * 3]


def test_a_talk_says_what_it_does_not_know(tiny_bundle: Path) -> None:
    done = run("chat", "--model", tiny_bundle, "--max-tokens", "2", stdin=b"/helo\n/help\n/quit\n")
    assert done.returncode == 0 and b"/helo is not a command; /help lists what is" in done.stderr
    assert b"/reset           forget what was said" in done.stderr and done.stdout == b""


# --- at a terminal ----------------------------------------------------------------------------------------

PROMPT = "\r\n\r> \x1b\\[K"
UP, LEFT = "\x1b[A", "\x1b[D"


@pytest.fixture
def own(tiny_bundle: Path, cache: Path) -> Iterator[Callable[..., pexpect.spawn]]:
    """Starts `flashd chat` with the tiny model, which answers in random letters."""
    begun: list[pexpect.spawn] = []

    def start(*more: str) -> pexpect.spawn:
        args = [*FLASHD[1:], "chat", "--model", str(tiny_bundle), "--ignore-eos", *more]
        child = pexpect.spawn(FLASHD[0], args, encoding="utf-8", codec_errors="replace", timeout=PATIENCE)
        begun.append(child)
        child.expect("/help says more." + PROMPT)
        return child

    yield start
    for child in begun:
        child.close(force=True)


def test_the_editor_is_that_of_the_serial_console(own: Callable[..., pexpect.spawn]) -> None:
    child = own("--max-tokens", "1", "--json")
    child.send(f"/hexlp{LEFT}{LEFT}\x7f\r")  # the cursor goes back, and x is erased
    child.expect("Up, Down         show the lines that you typed before" + ".*" + PROMPT)
    child.send("the\r")
    child.expect('{"text": .*' + PROMPT)
    child.send(f"{UP}{UP}")  # the line before the last
    child.expect("/help")
    child.send("\x15/helo\r")
    child.expect("/helo is not a command; /help lists what is" + PROMPT)
    child.send("lost\x03")  # Ctrl-C empties the line, and ends nothing
    child.expect(r"\^C" + PROMPT)
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_words_are_wrapped_as_wide_as_the_terminal_is(own: Callable[..., pexpect.spawn]) -> None:
    child = own()
    child.setwinsize(24, 40)
    child.send("/help\r")
    child.expect("during an answer.*" + PROMPT)
    rows = (child.before + child.after).replace("\r\n\r>", "\n>").split("\r\n")
    assert max(map(len, rows[1:])) <= 40 and "What you type during an answer is kept" in rows[-2]


def test_ctrl_c_stops_the_answer_and_what_was_typed_meanwhile_is_kept(own: Callable[..., pexpect.spawn]) -> None:
    child = own("--max-tokens", "100000", "--context", "500000", "--memory", "3G", "--stats")
    child.send("the other\r")
    child.expect("the other\r\n")
    child.expect(r"\S\S\S")  # the answer comes
    child.send("/he")
    child.expect(r"\S\S\S")
    child.sendintr()
    child.expect("\\(stopped\\)")
    child.expect("ended by interrupted")
    child.expect("> \x1b\\[K/he")  # at the prompt, in the editor
    child.send("lp\r")
    child.expect("/reset           forget")
    child.expect(PROMPT)
    child.send("the\r\x03")  # and at once, before anything has come
    child.expect("\\(stopped\\)")
    child.expect(PROMPT)
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_talk_that_fills_the_context_forgets_its_oldest_messages(own: Callable[..., pexpect.spawn]) -> None:
    child = own("--max-tokens", "4", "--context", "400", "--json")
    said = ""
    for i in range(12):
        child.send(f"{i} the other the other the\r")
        child.expect('{"text": ')
        child.expect(PROMPT)
        said += child.before
    assert said.count("(the context is full: the oldest 8 messages are forgotten)") >= 1, said
    assert "flashd: " not in said
    child.send("the other " * 90 + "\r")
    child.expect("flashd: the prompt has .* tokens and the context room for 399; shorten")
    child.expect(PROMPT)


def test_the_terminal_is_as_it_was_afterwards(tiny_bundle: Path, cache: Path) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    chat = [*FLASHD, "chat", "--model", str(tiny_bundle)]
    with subprocess.Popen(chat, stdin=slave, stdout=slave, stderr=slave) as process:
        wait(lambda: termios.tcgetattr(slave) != before, PATIENCE)
        os.write(master, b"\x04")
        assert process.wait(PATIENCE) == 0
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_a_terminal_is_shown_nothing_that_it_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b]52;c;eA==\x07\x9b2J\rb\n\tgrün 👩\u200d🌾 \u202e\u2066ab\u2069\u202c \u200f."
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with redirect_stdout(plain_output()):
        print(text, end="")  # piped
    assert shown.getvalue() == text
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    with redirect_stdout(plain_output()):
        print(text, end="")
    assert shown.getvalue() == text + "a]52;c;eA==2Jb\n\tgrün 👩\u200d🌾 ab \u200f."


def test_what_others_wrote_reaches_a_terminal_plain(tmp_path: Path) -> None:
    """A job of a client, and the name of a file, on a real terminal."""
    hostile = "a\x1b]0;owned\x07\x9b2Jb\u202e\u2067c"
    with closing(Spool(tmp_path / "spool.db", keep=5)) as spool:
        job = spool.add(Request(turns=(Turn("user", hostile),), source="api"))
        job.state, job.ended, job.result = State.DONE, 1.0, Result(text=hostile, finish=hostile)
        spool.end(job)
    for arguments in (
        ["show", "1", "--spool", tmp_path / "spool.db"], ["jobs", "--spool", tmp_path / "spool.db"],
        ["show", "1", "--json", "--spool", tmp_path / "spool.db"], ["info", tmp_path / hostile],
        ["jobs", "--spool", tmp_path / hostile],
    ):  # fmt: skip
        shown = pexpect.run(" ".join(shlex.quote(str(word)) for word in [*FLASHD, *arguments]), timeout=60).decode()
        assert "owned" in shown and not set(shown) & {*"\x1b\x07\x9b\u202e\u2067"}, (arguments, shown)
