"""The help: every command and option has some, in whole sentences, with the range and default of each number."""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args

import pytest

from flashd.bundle.rows.kinds import ROW_KINDS
from flashd.cli import options
from flashd.cli.arguments import Parser
from flashd.cli.parser import build, parse
from flashd.errors import UsageError
from tests.cli.command import run

SENTENCES = re.compile(r"[A-Z0-9].*[.]", re.DOTALL)
RANGE = re.compile(r"\(.+; default: .+\)\.")
UNSAID = {"number", "speed"}
"""Numbers with a range that only a file or a device knows."""


def commands() -> dict[str, Parser]:
    """The commands by name, and under '' the whole."""
    parser = build()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {"": parser, **action.choices}


def short_helps() -> dict[str, str]:
    """What `flashd --help` says of each command."""
    (action,) = (a for a in build()._actions if isinstance(a, argparse._SubParsersAction))
    return {a.dest: a.help or "" for a in action._choices_actions}


def arguments() -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in commands().items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                yield f"{name} {'/'.join(action.option_strings) or action.dest}", action


def test_every_option_has_help_in_sentences() -> None:
    found = dict(arguments())
    assert {"ask --top-k", "ask --min-p", "chat --repeat-penalty", "ask --seed", "bench bundle"} <= set(found)
    assert [name for name, action in found.items() if not SENTENCES.fullmatch(action.help or "")] == []


def test_every_number_says_its_range_and_its_default() -> None:
    numbers = {name: a for name, a in arguments() if a.type in (int, float) and a.dest not in UNSAID}
    assert len(numbers) > 20
    assert [name for name, action in numbers.items() if not RANGE.search(action.help or "")] == []


def test_every_command_has_help_in_a_sentence() -> None:
    shorts = short_helps()
    assert set(shorts) == set(commands()) - {""} and len(shorts) == len(get_args(options.Command))
    assert [name for name, text in shorts.items() if not SENTENCES.fullmatch(text)] == []
    for name, parser in commands().items():
        assert SENTENCES.fullmatch(parser.description or ""), name


def test_the_help_is_printed_and_names_installed_paths_only() -> None:
    for name in commands():
        done = run(*name.split(), "--help")
        assert done.returncode == 0 and done.stderr == b""
        assert not re.search(r"\bdeploy/|\bREADME|\btests/", done.stdout.decode())


def test_what_is_offered_is_what_the_packer_knows() -> None:
    assert get_args(options.Rows) == ROW_KINDS


@pytest.mark.parametrize("kind", get_args(options.Command))
def test_each_command_has_an_option_for_each_field_and_no_other(kind: type) -> None:
    (parser,) = (p for p in commands().values() if p.get_default("command") is kind)
    names = {a.dest for a in parser._actions} - {"help"}
    assert names == {f.name for f in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("ask hi --context 1", "--context 1 is out of range; allowed is 2 or more"),
        ("ask hi --max-tokens 0", "--max-tokens 0 is out of range; allowed is 1 or more"),
        ("plan --threads 300", "--threads 300 is out of range; allowed is 1 to 256"),
        ("jobs --most 0", "--most 0 is out of range; allowed is 1 or more"),
        ("pack m --out b --max-loss 0", "--max-loss 0 is out of range"),
        ("pack m --out b --text t", "add --max-loss or --select"),
        ("pack m --out b --select exact --text t", "--select exact loses nothing"),
        ("pack m --out b --select predictor", "--select predictor needs --text"),
        ("info", "name a bundle, or ask for --families"),
        ("update", "needs either a PATH or --undo"),
        ("update x --undo", "needs either a PATH or --undo"),
    ],
)
def test_options_that_do_not_fit_are_refused(typed: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(typed.split())
    assert words in str(error.value)


def test_a_command_that_asks_the_daemon_loads_nothing_large() -> None:
    """A console may be open for years on a board whose RAM the model needs."""
    look = (
        "import sys, flashd.cli.main, flashd.cli.commands.ask, flashd.cli.commands.ask_daemon;"
        "flashd.cli.main.parse(['chat']);"
        "print([m for m in ('numpy', 'onnxruntime', 'tokenizers', 'jinja2', 'yaml') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, check=True).stdout == b"[]\n"
