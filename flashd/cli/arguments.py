"""What several commands have in common: their parser, and arguments that more than one of them takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from flashd.cli import options as o
from flashd.errors import UsageError

Number = type[int] | type[float]
BUNDLE, YAML = "FILE.flash", "FILE.yaml"


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError. argparse's own would end the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def command(commands: Commands, name: str, kind: Callable[..., Any], text: str, more: str = "") -> Parser:
    """A command's parser. `kind` is built of its options."""
    parser = commands.add_parser(name, help=text, description=f"{text} {more}".strip())
    parser.set_defaults(command=kind)
    return parser


def number(
    parser: Parser, option: str, kind: Number, text: str, allowed: str, default: float | None, words: str = ""
) -> None:
    """An option that is a number. `words` say what None stands for."""
    metavar = "N" if kind is int else "X"
    limits = f"{allowed}; default: {words or f'{default:g}'}"
    parser.add_argument(
        option, type=kind, default=default, metavar=metavar, help=f"{text.removesuffix('.')} ({limits})."
    )


def flag(parser: Parser, option: str, text: str) -> None:
    parser.add_argument(option, action="store_true", help=text)


def json_flag(parser: Parser) -> None:
    flag(parser, "--json", "Print JSON, for programs.")


def bundle(parser: Parser, text: str, optional: bool = False) -> None:
    parser.add_argument("bundle", type=Path, nargs="?" if optional else None, metavar=BUNDLE, help=text)


def draft(parser: Parser) -> None:
    text = "Let this smaller model of the same tokenizer make guesses, if that is faster. The text stays the same."
    parser.add_argument("--draft", type=Path, metavar=BUNDLE, help=text)


def name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="The bundle's name, as flashd models lists it, or its path.")


def config(parser: Parser) -> None:
    parser.add_argument(
        "--config", type=Path, default=o.CONFIG, metavar=YAML, help="Read this configuration (default: %(default)s)."
    )
