"""Other people's text without what a terminal would obey: the one filter on the way to terminals and the journal."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import unicodedata
from typing import Any, TextIO, cast

KEPT = "\n\t"
"""Control characters that only lay text out."""


TURNS = "\u202a-\u202e\u2066-\u2069"
"""Embeddings, overrides and isolates: a terminal that knows them shows what follows in another order. Marks of
direction, which Arabic and Hebrew have, turn nothing but themselves."""

TURNING = re.compile(f"[{TURNS}]")


def printable(text: str, kept: str = KEPT) -> str:
    """The text without what a terminal obeys: control characters other than those in `kept`, and TURNS."""
    if text.isascii() and text.isprintable():
        return text
    return TURNING.sub("", "".join(c for c in text if c in kept or unicodedata.category(c) != "Cc"))


def printable_json(text: str) -> str:
    """JSON that says the same, with what a terminal obeys spelt."""
    return re.sub(rf"[\x7f-\x9f{TURNS}]", lambda found: f"\\u{ord(found[0]):04x}", text)


class PlainFormatter(logging.Formatter):
    """Log records as a terminal or the journal may have them: a message is one line, only a traceback has several."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record).replace("\n", " "))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return printable(super().formatException(ei))


class Plain:
    """A text stream that lets nothing through that a terminal would obey."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_journal(descriptor: int) -> bool:
    """systemd.exec(5): JOURNAL_STREAM names the device and inode of the stream, if it was not redirected since."""
    here = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{here.st_dev}:{here.st_ino}"


def plain_output() -> TextIO:
    """Standard output, filtered if a terminal or the journal shows it. It takes any text.

    A file's name need not be UTF-8, and then its bytes come out as they are. What the locale cannot spell is escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        shown = sys.stdout.isatty() or is_journal(sys.stdout.fileno())
    except (OSError, ValueError):  # it is closed, or is not a file
        shown = False
    return plain(sys.stdout) if shown else sys.stdout


def plain(stream: TextIO) -> TextIO:
    """A stream that shows other people's text."""
    return cast(TextIO, Plain(stream))
