"""Streamed text for a terminal of so many columns: wrapped at words, in ASCII where it must be."""

from __future__ import annotations

import unicodedata

from device.consoles.line_editor import width

ASCII = str.maketrans(
    {
        "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "•": "*", "→": "->", "×": "x",
        "°": "deg ", "€": "EUR", "µ": "u", "ß": "ss", "æ": "ae", "ø": "o", "\xa0": " ",
    }
)  # fmt: skip


def to_ascii(text: str) -> str:
    """The text in ASCII: accents dropped, signs spelt, the rest a question mark."""
    plain = unicodedata.normalize("NFKD", text.translate(ASCII))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


class Wrap:
    """Breaks a stream into rows at spaces. A word is held back until it is known whether it fits."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0
        self._word = ""
        self._space = ""

    def push(self, text: str) -> str:
        """What may be shown of the text so far."""
        out = ""
        for c in text:
            if c == "\n":
                out += self._end_word() + "\r\n"
                self._column, self._space = 0, ""
            elif c in " \t":
                out += self._end_word()
                self._space += " " if c == " " else "    "
            elif c.isprintable():
                self._word += c
                if width(self._word) >= self._columns:
                    out += self._end_word()
        return out

    def finish(self) -> str:
        """What was held back."""
        out = self._end_word()
        self._column, self._space = 0, ""
        return out

    def _end_word(self) -> str:
        if not self._word:
            return ""
        word, space = self._word, self._space
        self._word = self._space = ""
        if self._column + len(space) + width(word) > self._columns:
            out = "\r\n" if self._column else ""
            self._column, space = 0, ""
        else:
            out = ""
        while width(word) > self._columns:
            out += word[: self._columns] + "\r\n"
            word = word[self._columns :]
        self._column += len(space) + width(word)
        return out + space + word
