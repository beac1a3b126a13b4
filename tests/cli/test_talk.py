"""The talk of a person at a terminal."""

from __future__ import annotations

import io
import sys
from itertools import pairwise
from pathlib import Path

import pexpect
import pytest

from flashd.cli.printing import for_terminal
from flashd.cli.talk import MOST_TURNS, Turns, talk
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
    assert for_terminal(text) == text  # piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert for_terminal(text) == "a]52;c;eA==2Jb\n\tgrün 👩\u200d🌾"


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
