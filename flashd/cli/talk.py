"""A talk with a person, one line at a time. It does not know who answers."""

from __future__ import annotations

import sys
from collections.abc import Callable

from flashd.errors import DataError, UsageError
from flashd.system.printable import printable

MOST_TURNS = 64
"""A talk keeps this many messages, since a console may be left on for years."""

Turns = list[tuple[str, str]]
"""The messages of a talk: who spoke (system, user, assistant), and what was said."""


def talk(system: str | None, answer: Callable[[Turns], str | None]) -> None:
    """Reads questions from standard input until Ctrl-D, Ctrl-C or /quit.

    Args:
        system: the system prompt.
        answer: prints the answer to the last message and returns it. None: the question is forgotten.
    """
    first = [("system", system)] if system else []
    turns: Turns = []
    if sys.stdin.isatty():
        print("Ctrl-C stops an answer. Ctrl-D or /quit ends the talk. /reset forgets.", file=sys.stderr, flush=True)
    while (line := _next_line()) is not None and line != "/quit":
        if line == "/reset":
            turns = []
        elif line.startswith("/") and len(line.split()) == 1:
            text = f"{line} is not a command; the commands are /reset and /quit"
            print(printable(text), file=sys.stderr, flush=True)
        elif line:
            asked = [*turns, ("user", line)]
            try:
                said = answer([*first, *asked])
            except UsageError as error:
                print(printable(f"flashd: {error}; /reset starts a new talk"), file=sys.stderr, flush=True)
                continue
            if said is not None:
                turns = [*asked, ("assistant", said)]
                if len(turns) > MOST_TURNS:
                    # many at once: questions then begin alike for some time, and the KV cache of that is kept
                    del turns[: MOST_TURNS // 2]


def checked(text: str) -> str:
    """The prompt. Raises DataError if it is not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not UTF-8 (character {error.start}); send UTF-8 text") from error
    return text


def _next_line() -> str | None:
    # not input(): it would show its prompt on descriptor 2, which may not be the terminal
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt is not UTF-8 (byte {error.start}); send UTF-8 text") from error
    if not line:
        print()
        return None
    return checked(line).strip()
