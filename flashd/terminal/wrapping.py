"""Streamed text for a terminal of so many columns: wrapped at words, in ASCII where it must be."""

from __future__ import annotations

import unicodedata

from flashd.terminal.characters import as_shown, fitting, width

ASCII = str.maketrans(
    {
        "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "•": "*", "→": "->", "×": "x",
        "°": "deg ", "€": "EUR", "µ": "u", "ß": "ss", "æ": "ae", "ø": "o",
    }
)  # fmt: skip

ROW_ENDS = "\n\v\f\x85\u2028\u2029"
TAB = "    "


def to_ascii(text: str) -> str:
    """The text in ASCII: accents and joiners dropped, signs spelt, the rest a question mark."""
    plain = unicodedata.normalize("NFKD", text.translate(ASCII))
    return (
        "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
        .encode("ascii", "replace")
        .decode()
    )


class Wrap:
    """Breaks a stream into rows at spaces. A word is held back until it is known whether it fits.

    No row is wider than `columns`. What would control the terminal is shown as a replacement character.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0
        self._word = ""
        self._space = ""
        self._after_return = False

    def push(self, text: str) -> str:
        """What may be shown of the text so far."""
        return "".join(self._push(c) for c in text)

    def finish(self) -> str:
        """What was held back."""
        out = self._end_word()
        self._column, self._space = 0, ""
        return out

    def _push(self, c: str) -> str:
        after_return, self._after_return = self._after_return, c == "\r"
        if c == "\n" and after_return:
            return ""
        if c == "\r" or c in ROW_ENDS:
            return self.finish() + "\r\n"
        shown = as_shown(c)
        if shown == " ":
            out = self._end_word()
            self._space += TAB if c == "\t" else " "
            return out
        self._word += shown
        return self._cut_word() if width(self._word) > self._columns else ""

    def _cut_word(self) -> str:
        """As much of a word as a row has room for, which is more than a row."""
        start = "\r\n" if self._column else ""
        head = fitting(self._word, self._columns)
        self._word, self._space, self._column = self._word[len(head) :], "", 0
        return f"{start}{head}\r\n"

    def _end_word(self) -> str:
        if not self._word:
            return ""
        word, space = self._word, self._space
        self._word = self._space = ""
        start = ""
        if self._column + len(space) + width(word) > self._columns:
            start = "\r\n" if self._column else ""
            self._column, space = 0, ""
        self._column += len(space) + width(word)
        return start + space + word
