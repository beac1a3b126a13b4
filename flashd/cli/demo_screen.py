"""The demo's terminal: lines that stay, and below them one line that shows the board as it is."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from io import TextIOBase

from flashd.system.printable import printable
from flashd.terminal.characters import fitting

ERASE = "\r\x1b[K"


class DemoScreen:
    """Standard output. If it is no terminal, only the lines that stay are written. Close it.

    Any thread may write.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._below = ""
        self._out = sys.__stdout__ or sys.stdout  # the commands' own lets nothing through that moves the cursor
        self._drawing = self._out.isatty()

    def say(self, text: str) -> None:
        """Lines that stay."""
        lines = "\n".join(printable(line) for line in text.splitlines())
        with self._lock:
            self._write(f"{ERASE}{lines}\n{self._below}" if self._drawing else f"{lines}\n")

    def show(self, line: str) -> None:
        """The line at the bottom, in place of the one before."""
        if not self._drawing:
            return
        with self._lock:
            self._below = fitting(printable(line), shutil.get_terminal_size().columns - 1)
            self._write(ERASE + self._below)

    def close(self) -> None:
        with self._lock:
            if self._drawing:
                self._write(ERASE)
            self._drawing, self._below = False, ""

    def take_log(self) -> None:
        """Has the log's lines stay above the board, if both are on a terminal."""
        if not (self._drawing and sys.stderr.isatty()):
            return
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(_Lines(self))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class _Lines(TextIOBase):
    """What a log handler writes to."""

    def __init__(self, screen: DemoScreen) -> None:
        self._screen = screen

    def write(self, text: str) -> int:
        self._screen.say(text)
        return len(text)
