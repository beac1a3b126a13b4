"""Escape sequences of a terminal's keys and answers, each swallowed to its end.

ECMA-48 has control sequences (`ESC [`), strings (`ESC ]` and others, up to BEL or `ESC \\`) and short ones. Beside it
are F1 to F5 of the Linux console (`ESC [ [ A`), keys as `ESC O P`, and mice whose `ESC [ M` is followed by three
characters.
"""

from __future__ import annotations

ESC, BEL = "\x1b", "\x07"

ABANDON = "\r\n\x03\x04\x18\x1a"
"""What ends any sequence that has not come to its end, so that noise cannot swallow what is typed after it."""

STRINGS = "]PX^_"
"""After ESC: OSC, DCS, SOS, PM, APC."""

MOUSE_CHARACTERS = 3


class Escapes:
    """Takes the sequences out of a stream of characters."""

    def __init__(self) -> None:
        self._so_far: str | None = None  # what has come after ESC; None: no sequence is open
        self._string_escape = False  # in a string, ESC has just come

    def take(self, c: str) -> str | None:
        """A sequence without its ESC when it is complete, "" while it is not, None for what belongs to none."""
        if c in ABANDON:
            self._so_far = None
            return None
        if self._so_far and self._so_far[0] in STRINGS:
            return self._in_string(c)
        if c == ESC:
            self._so_far, self._string_escape = "", False
            return ""
        if self._so_far is None:
            return None
        sequence, self._so_far = self._so_far + c, None
        # behind ESC any character is a sequence: Alt with that key
        if not (" " <= c <= "~" or len(sequence) == 1 or sequence.startswith("[M")):
            return None
        if _complete(sequence):
            return sequence
        self._so_far = sequence
        return ""

    def _in_string(self, c: str) -> str:
        if c == BEL or (self._string_escape and c == "\\"):
            self._so_far = None
        self._string_escape = c == ESC
        return ""


def _complete(sequence: str) -> bool:
    last = sequence[-1]
    if sequence[0] == "[":
        if sequence[1:2] == "[":
            return len(sequence) == 3
        if sequence[1:2] == "M":
            return len(sequence) == 2 + MOUSE_CHARACTERS
        return len(sequence) > 1 and "@" <= last <= "~"
    if sequence[0] == "O":
        return len(sequence) > 1 and last not in "0123456789;"
    return sequence not in STRINGS and not " " <= last <= "/"
