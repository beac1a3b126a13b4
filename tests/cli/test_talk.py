"""The talk of a person at a terminal."""

from __future__ import annotations

import io
import shlex
import sys
from contextlib import closing, redirect_stdout
from itertools import pairwise
from pathlib import Path

import pexpect
import pytest

from flashd.cli.talk import MOST_TURNS, Turns, talk
from flashd.daemon.job import Request, Result, State, Turn
from flashd.daemon.spool import Spool
from flashd.system.printable import plain_output
from tests.cli.command import FLASHD, run


def test_of_a_long_talk_much_is_forgotten_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that questions begin alike for some time, and their KV cache is kept."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" * 80))
    asked: list[int] = []

    def answer(turns: Turns) -> str:
        asked.append(len(turns))
        return "yes"

    talk("Be brief.", answer)
    assert max(asked) == MOST_TURNS + 2  # with the system's words and the question
    assert sum(later < earlier for earlier, later in pairwise(asked)) <= 3


def test_a_talk_says_what_it_does_not_know(tiny_bundle: Path) -> None:
    done = run("chat", "--model", tiny_bundle, "--max-tokens", "2", stdin=b"/help\n/quit\n")
    assert done.returncode == 0 and b"/help is not a command; the commands are /reset and /quit" in done.stderr


def test_a_terminal_is_shown_nothing_that_it_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b]52;c;eA==\x07\x9b2J\rb\n\tgrün 👩\u200d🌾"
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with redirect_stdout(plain_output()):
        print(text, end="")  # piped
    assert shown.getvalue() == text
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    with redirect_stdout(plain_output()):
        print(text, end="")
    assert shown.getvalue() == text + "a]52;c;eA==2Jb\n\tgrün 👩\u200d🌾"


def test_chat_remembers_and_ends(packed: dict[str, Path]) -> None:
    args = [*FLASHD[1:], "chat", "--model", str(packed["int4"]), "--max-tokens", "12"]
    child = pexpect.spawn(FLASHD[0], args, encoding="utf-8", timeout=120)
    child.expect("> ")
    child.sendline("My name is Ada. Say hello.")
    child.expect("> ")
    child.sendline("/reset")
    child.expect("> ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_what_others_wrote_reaches_a_terminal_plain(tmp_path: Path) -> None:
    """A job of a client, and the name of a file, on a real terminal."""
    hostile = "a\x1b]0;owned\x07\x9b2Jb"
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
        assert "owned" in shown and not set(shown) & {"\x1b", "\x07", "\x9b"}, (arguments, shown)
