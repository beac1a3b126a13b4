"""A talk with a person, a line at a time, whoever answers."""

from __future__ import annotations

import sys
from collections.abc import Callable

from flashd.errors import DataError, UsageError
from flashd.system.printable import printable

MOST_TURNS = 64
"""Messages of a talk that are kept: a console may be left on for years."""

Turns = list[tuple[str, str]]
"""Messages of a talk: who (system, user, assistant), and what was said."""


def talk(system: str | None, answer: Callable[[Turns], str | None]) -> None:
    """Reads questions from standard input until Ctrl-D, Ctrl-C or /quit.

    Args:
        system: the system prompt.
        answer: says the answer to the last message, and gives it; None where the question is to be forgotten.
    """
    first = [("system", system)] if system else []
    turns: Turns = []
    if sys.stdin.isatty():
        print("Ctrl-C stops an answer, Ctrl-D or /quit ends, /reset forgets.", file=sys.stderr, flush=True)
    while (line := _next_line()) is not None and line != "/quit":
        if line == "/reset":
            turns = []
        elif line.startswith("/") and len(line.split()) == 1:
            print(printable(f"{line} is not known; there are /reset and /quit"), file=sys.stderr, flush=True)
        elif line:
            asked = [*turns, ("user", line)]
            try:
                said = answer([*first, *asked])
            except UsageError as error:
                print(printable(f"flashd: {error}; /reset starts anew"), file=sys.stderr, flush=True)
                continue
            if said is not None:
                turns = [*asked, ("assistant", said)]
                if len(turns) > MOST_TURNS:
                    # many at once: until the next time all questions begin alike, and their KV cache is kept
                    del turns[: MOST_TURNS // 2]


def checked(text: str) -> str:
    """A prompt that is text. Raises DataError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not UTF-8 (character {error.start}); send UTF-8 text") from error
    return text


def _next_line() -> str | None:
    # not input(), which shows its prompt on descriptor 2, wherever that leads
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
