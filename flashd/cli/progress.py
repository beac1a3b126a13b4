"""What a person at a terminal sees while flashd works: one row on standard error, which disappears afterwards."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from flashd.system.memory import MIB
from flashd.system.printable import printable

if TYPE_CHECKING:
    from tqdm import tqdm

CLEAR = "\x1b[K"
"""Erases the rest of a terminal's row."""


class Bar:
    """A progress bar, shown only on a terminal, from the first time on that there is progress."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit, self._closed = what, unit, not sys.stderr.isatty()
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the bar. Nothing shows it again."""
        self._closed = True
        if self._bar is not None:  # a bar of nothing is false
            self._bar.close()

    def show(self, done: int, total: int, note: str = "") -> None:
        """Moves the bar to `done` of `total`."""
        if self._closed:
            return
        if self._bar is None:
            self._bar = _on_terminal(self._what, self._unit)
        self._bar.total, self._bar.n = total, done
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.refresh()

    def show_pass(self, done: int, layers: int, card_bytes: int) -> None:
        """An OnStep of the engine: how many layers of a pass are done, and how much was read from the card."""
        self.show(done, layers, f"{card_bytes / MIB:.0f} MiB from the card" if card_bytes else "")


def _on_terminal(what: str, unit: str) -> tqdm[NoReturn]:
    from tqdm import tqdm  # where no bar is shown it is not loaded

    shape = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} " + unit + "{postfix}, {remaining} left"
    return tqdm(total=0, desc=what, file=sys.stderr, leave=False, bar_format=shape, unit_scale=True)


class Waiting:
    """A row that is shown on a terminal until the first words of an answer come."""

    SECONDS, OFTEN = 1.0, "thinking"
    """How often the row shows what changes all the time. A place in the queue is shown at once: it may stand long."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._closed = not sys.stderr.isatty()
        self.show("waiting")

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self._closed or (text.startswith(self.OFTEN) and now - self._shown < self.SECONDS):
            return
        self._shown = now
        print(
            f"\r{printable(text, kept='')[: shutil.get_terminal_size().columns - 1]}{CLEAR}",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Removes the row."""
        if not self._closed:
            self._closed = True
            print(f"\r{CLEAR}", end="", file=sys.stderr, flush=True)
