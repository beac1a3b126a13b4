"""An answer as it comes, and what is told of it at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from flashd.cli.options import Answering, Ask
from flashd.cli.printing import answer_as_json, cost_in_words, say_cut
from flashd.system.printable import printable

STOPPED = "interrupted"
"""How an answer ended that Ctrl-C cut short."""


@dataclass
class Said:
    """An answer as it comes."""

    text: str = ""
    thoughts: str = ""
    shown: bool = False  # some of the text is on the screen
    finish: str = ""  # stop, length, context, or STOPPED
    forgotten: int = 0  # the oldest messages of the talk that were left out, since the context was full
    stopped: bool = False  # Ctrl-C was pressed
    figures: dict[str, float] = field(default_factory=dict)


class Aside:
    """Thoughts on standard error, in front of the answer on standard output, if somebody asked to see them."""

    def __init__(self, options: Answering) -> None:
        self._wanted = isinstance(options, Ask) and bool(options.think) and not options.json
        self._begun = False

    def say(self, thought: str, close: Callable[[], None]) -> None:
        """Shows more of the thoughts. `close` takes away the row that said what is waited for."""
        if self._wanted:
            close()
            self._begun = True
            print(printable(thought), end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The answer follows."""
        if self._begun:
            self._begun = False
            print("\n", file=sys.stderr, flush=True)


def print_end(options: Answering, said: Said) -> None:
    """Prints what is told of an answer when it has ended: all of it with --json, else why it was cut; its cost."""
    if options.json:
        print(answer_as_json(said.text, said.thoughts, said.finish, said.figures), flush=True)
    elif not options.ignore_eos:
        say_cut(said.finish)
    if options.stats and said.figures:
        print(cost_in_words(said.finish, said.figures), file=sys.stderr, flush=True)
