"""Characters on a terminal: what each is shown as, which belong together, and how wide they are.

wcwidth knows the widths and the clusters, such as a family of emoji that is drawn as one.
"""

from __future__ import annotations

import unicodedata

import wcwidth

REPLACEMENT = "\ufffd"
"""What is shown of a character that would control the terminal; a decoder makes it of bytes that are not UTF-8."""

INVISIBLE = frozenset("\u00ad\u061c\u200c\u200d\u200e\u200f\u2060") | {chr(c) for c in range(0xE0020, 0xE0080)}
"""What shapes its neighbours and is kept: joiners, the non-joiner of Persian, marks of direction, tags of flags."""


def as_shown(c: str) -> str:
    """A character as a terminal may have it: any space is a space, and nothing is dropped."""
    if unicodedata.category(c) in ("Zs", "Zl", "Zp") or c == "\t":
        return " "
    return c if c.isprintable() or c in INVISIBLE else REPLACEMENT


def clusters(text: str) -> list[str]:
    """The text in pieces that a person sees as one character each."""
    return list(wcwidth.iter_graphemes(text))


def width(text: str) -> int:
    """Columns that a text takes on a terminal. It is of characters `as_shown`."""
    return max(0, wcwidth.wcswidth(text))


def fitting(text: str, columns: int) -> str:
    """As much of the beginning of a text as so many columns have room for: whole clusters, or else characters.

    Empty if there is no room for the first character.
    """
    for pieces in (clusters(text), list(text)):
        taken = ""
        for piece in pieces:
            if width(taken + piece) > columns:
                break
            taken += piece
        if taken:
            return taken
    return ""
