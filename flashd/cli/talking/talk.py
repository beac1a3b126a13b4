"""A talk with a person, one question at a time. It knows neither who answers nor what the person sits at."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flashd.cli.options import Answering
from flashd.cli.talking.said import Said, print_end
from flashd.errors import FlashdError

MOST_TURNS = 64
"""A talk keeps this many messages, since a console may be left on for years."""

GREETING = "Ctrl-C stops an answer. Ctrl-D or /quit ends the talk. /help says more."
HELP = """\
Type a question and press Enter.
1, 2, ...        ask one of the questions that are shown at the start
Enter alone      show them again
/reset           forget what was said
/quit, Ctrl-D    end the talk
Ctrl-C           stop an answer, or empty the line
Up, Down         show the lines that you typed before
Left, Right      move in the line; Home and End, or Ctrl-A and Ctrl-E, go to its ends
Ctrl-W, Ctrl-U   erase the word, or all, before the cursor
What you type during an answer is kept for the next line."""

MOST_PRESETS = 9
"""Questions that are shown, each with a number of one digit."""


@dataclass(frozen=True)
class Welcome:
    """What whoever comes to the terminal is shown."""

    title: str = ""
    presets: tuple[str, ...] = ()  # questions that a number asks

    @property
    def text(self) -> str:
        """Its rows."""
        rows = [f"{self.title} - flashd"] if self.title else []
        return "\n".join([*rows, *(f"{i}  {text}" for i, text in enumerate(self.presets, 1)), GREETING])


Turns = list[tuple[str, str]]
"""The messages of a talk: who spoke (system, user, assistant), and what was said."""


class Desk(Protocol):
    """Where the person sits: a terminal, or a pipe."""

    def next_line(self) -> str | None:
        """The next line that was typed, without spaces around it. None if there are no more."""

    def answer(self, said: Said, work: Callable[[], None]) -> None:
        """Lets `work` answer. Ctrl-C sets `said.stopped`, and `work` ends."""

    def say(self, piece: str) -> None:
        """Shows a piece of the answer."""

    def note(self, text: str) -> None:
        """Shows what is no answer."""

    def greet(self, text: str) -> None:
        """Shows a person how to begin."""


class Talk:
    """What was said so far, and what the person may do with it.

    Args:
        desk: where the person sits.
        options: what was asked for on the command line.
        answer: answers the last of some messages. It fills `Said`, and shows the text with `desk.say`.
        welcome: says what is shown at the start, and whenever Enter is pressed alone.
        reset: is called when what was said is to be forgotten.
    """

    def __init__(
        self, desk: Desk, options: Answering, answer: Callable[[Turns, Said], None],
        welcome: Callable[[], Welcome] = Welcome, reset: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._desk, self._options, self._answer, self._welcome = desk, options, answer, welcome
        self._reset = reset
        self._presets: tuple[str, ...] = ()
        self._first = [("system", options.system)] if options.system else []
        self._turns: Turns = []

    def run(self) -> None:
        """Talks until there are no more lines, or one is /quit."""
        self._greet()
        while (line := self._desk.next_line()) is not None and line != "/quit":
            if not line:
                self._greet()
            elif line == "/reset":
                self._turns = []
                self._reset()
            elif line == "/help":
                self._desk.note(HELP)
            elif line.startswith("/") and len(line.split()) == 1:
                self._desk.note(f"{line} is not a command; /help lists what is")
            elif self._presets and not self._turns and re.fullmatch("[0-9]{1,3}", line):
                self._preset(int(line))
            else:
                self._ask(line)

    def _greet(self) -> None:
        welcome = self._welcome()
        self._presets = welcome.presets
        self._desk.greet(welcome.text)

    def _preset(self, number: int) -> None:
        """Asks the question of a number. Later in a talk a number may be an answer to the model."""
        if 1 <= number <= len(self._presets):
            self._ask(self._presets[number - 1])
        else:
            self._desk.note(f"no preset question has the number {number}; there are 1 to {len(self._presets)}")

    def _ask(self, question: str) -> None:
        asked: Turns = [*self._turns, ("user", question)]
        said = Said()
        try:
            self._desk.answer(said, lambda: self._answer([*self._first, *asked], said))
        except FlashdError as error:
            self._desk.note(f"flashd: {error}")
            return
        if said.stopped:
            self._desk.note("(stopped)")
        print_end(self._options, said)
        if not said.text:
            return
        self._turns = [*asked, ("assistant", said.text)][said.forgotten :]
        if said.forgotten:
            self._desk.note(f"(the context is full: the oldest {said.forgotten} messages are forgotten)")
        if len(self._turns) > MOST_TURNS:
            # many at once: questions then begin alike for some time, and the KV cache of that is kept
            del self._turns[: MOST_TURNS // 2]
            self._desk.note("(the older half of this talk is forgotten)")
