"""The tool that runs a program with arguments of allowed kinds, for a bounded time, and reads a bounded text."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from device.tools.course import Course, Done, NotDone
from device.tools.tool import Reach, Tool
from flashd.config.arguments import filled
from flashd.config.tools import RunProgram
from flashd.system.printable import printable
from flashd.system.program import goes_first, kill, last_line, read_to_end

BYTES_PER_CHARACTER = 4
FIRST = 120
"""Characters of a result that people are told."""


class Run(Tool):
    """A program. It is run without a shell, so no text of an argument is a command.

    When its time is up, or it prints too much, it ends with all that it started.
    """

    def __init__(self, settings: RunProgram, reach: Reach) -> None:
        self._settings, self._confirmation = settings, reach.confirmation

    def do(self, arguments: Mapping[str, Any], course: Course) -> Done:
        texts = self._texts(arguments)
        name = self._settings.name.replace("_", " ")
        called = f"{name} ({', '.join(texts.values())})" if texts else name
        if self._settings.confirm:
            self._confirmation.ask(f"run {called}", course)
        result = self._result(filled(self._settings.command, texts), course.wanted)
        first = result.strip().partition("\n")[0]
        return Done(result, f"It ran {called}: {first[:FIRST]}{'...' if len(first) > FIRST else ''}")

    def _texts(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """The arguments as the program gets them. Raises NotDone if one is not allowed."""
        wanted = {argument.name: argument for argument in self._settings.arguments}
        if set(arguments) != set(wanted):
            raise NotDone(f"its arguments are {', '.join(wanted) or 'none'}")
        try:
            return {name: argument.spelt(arguments[name]) for name, argument in wanted.items()}
        except ValueError as error:
            raise NotDone(str(error)) from error

    def _result(self, command: list[str], wanted: Callable[[], bool]) -> str:
        s, until = self._settings, time.monotonic() + self._settings.timeout
        most = BYTES_PER_CHARACTER * s.longest

        def goes_on() -> bool:
            return wanted() and time.monotonic() < until

        with _started(command) as program:
            try:
                goes_first(program)
                printed = read_to_end(program, goes_on, most + 1)
            finally:
                kill(program)
            ended = program.returncode
        text = printable(printed.decode("utf-8", "replace")).strip()
        if len(printed) > most or len(text) > s.longest:
            return f"{text[: s.longest]} (cut: it printed more)"
        if ended is None:
            why = f"it took more than {s.timeout:g} s, and was ended" if wanted() else "it was stopped"
            return f"It failed: {why}."
        if ended:
            said = last_line(printed)[: s.longest]
            return f"It failed with {ended}{f': {printable(said)}' if said else '.'}"
        return text or "done"


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise NotDone(f"{command[0]} cannot be started: {error.strerror}") from error
