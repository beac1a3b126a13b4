"""Line editing over a byte stream: what a person at a serial cable expects of a prompt.

Our own rather than prompt_toolkit: that costs 17 MiB of RAM (measured), and asks the terminal questions to which
a microcontroller or a bare terminal program has no answer. One row of the terminal is used; a longer line
scrolls in it. The cursor goes from cluster to cluster: an accent or a family of emoji is never cut in two.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from enum import Enum

from flashd.terminal.characters import REPLACEMENT, as_shown, clusters, fitting, width
from flashd.terminal.escapes import Escapes

MAX_LINE = 4096
"""Characters of a line; what comes beyond is not taken, with one bell."""

MAX_HISTORY = 100

ENDS = b"\r\n\x03\x04"
"""What an entry ends with: Enter, Ctrl-C, Ctrl-D."""

MAX_CLUSTER = 32
"""Characters of a cluster: so far is looked for its ends."""

ESCAPES = {
    "[A": "up", "[B": "down", "[C": "right", "[D": "left", "[H": "home", "[F": "end", "OH": "home", "OF": "end",
    "[1~": "home", "[7~": "home", "[4~": "end", "[8~": "end", "[3~": "delete", "OA": "up", "OB": "down",
    "OC": "right", "OD": "left",
}  # fmt: skip
CONTROLS = {
    "\x01": "home", "\x02": "left", "\x05": "end", "\x06": "right", "\x08": "backspace", "\x7f": "backspace",
    "\x0b": "kill", "\x0c": "redraw", "\x0e": "down", "\x10": "up", "\x15": "clear", "\x17": "word",
}  # fmt: skip


class Key(Enum):
    """What is not a line."""

    INTERRUPT = "Ctrl-C"
    END = "Ctrl-D on an empty line"


class LineEditor:
    """Bytes in, whole lines out; the echo goes to `write`."""

    def __init__(self, write: Callable[[str], None], columns: int, prompt: str = "> ") -> None:
        self.columns = columns  # of the terminal; whoever changes it calls `start`
        self._write, self._prompt = write, prompt
        self._text, self._at = "", 0
        self._history: list[str] = []
        self._shown = 0  # the entry of the history that is shown; len(history) is the line being written
        self._draft = ""
        self._escapes = Escapes()
        self._after_return = False
        self.full = False  # characters beyond MAX_LINE came
        self.garbled = False  # bytes came that are not UTF-8
        self._stale = False  # the row is not what it should be
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def empty(self) -> bool:
        """Whether nothing is typed, so that a line may be shown in place of the prompt."""
        return not self._text

    def start(self) -> None:
        """Shows the prompt and an empty line."""
        self._set("")
        self._shown = len(self._history)
        self._draw()

    def next(self, data: bytes) -> tuple[str | Key | None, bytes]:
        """The first line or key that these bytes complete, and the bytes behind it.

        What was typed ahead can so be shown when its turn comes, behind a prompt of its own.
        """
        end = next((i for i, byte in enumerate(data, 1) if byte in ENDS), len(data))
        entries = self.feed(data[:end])
        return (entries[0] if entries else None), data[end:]

    def feed(self, data: bytes) -> list[str | Key]:
        """The lines and keys that these bytes complete. The row is drawn anew once, however many they are."""
        self.full = self.garbled = False
        done: list[str | Key] = []
        for character in self._decoder.decode(data):
            result = self._character(character)
            if result is not None:
                done.append(result)
        self._refresh()
        return done

    def _character(self, c: str) -> str | Key | None:
        sequence = self._escapes.take(c)
        if sequence is not None:
            if sequence in ESCAPES:
                self._action(ESCAPES[sequence])
            return None
        after_return, self._after_return = self._after_return, c == "\r"
        if c == "\n" and after_return:
            return None
        if c in "\r\n":
            return self._enter()
        if c == "\x03":
            self._refresh()
            self._write("^C\r\n")
            self._set("")
            return Key.INTERRUPT
        if c == "\x04":
            return Key.END if not self._text else None
        if c == REPLACEMENT:
            self.garbled = True
        elif c in CONTROLS:
            self._action(CONTROLS[c])
        elif c >= " " or c == "\t":  # other keys with Ctrl mean nothing
            self._insert(as_shown(c))
        return None

    def _enter(self) -> str:
        line = self._text
        if line.strip() and (not self._history or self._history[-1] != line):
            self._history = [*self._history[-MAX_HISTORY + 1 :], line]
        self._refresh()
        self._write("\r\n")
        self._set("")
        self._shown = len(self._history)
        return line

    def _insert(self, c: str) -> None:
        if len(self._text) >= MAX_LINE:
            if not self.full:
                self._write("\a")
            self.full = True
            return
        at_end = self._at == len(self._text)
        self._text = self._text[: self._at] + c + self._text[self._at :]
        self._at += 1
        if at_end and not self._stale and width(self._prompt + self._text) < self.columns:
            self._write(c)
        else:
            self._stale = True

    def _action(self, name: str) -> None:
        text, at = self._text, self._at
        left, right = self._neighbours()
        if name == "backspace":
            self._text, self._at = text[:left] + text[at:], left
        elif name == "delete":
            self._text = text[:at] + text[right:]
        elif name == "word":
            start = len(text[:at].rstrip().rpartition(" ")[0])
            start += start > 0
            self._text, self._at = text[:start] + text[at:], start
        elif name == "kill":
            self._text = text[:at]
        elif name == "clear":
            self._text, self._at = text[at:], 0
        elif name in ("up", "down"):
            self._recall(-1 if name == "up" else 1)
        else:
            self._at = {"left": left, "right": right, "home": 0, "end": len(text)}.get(name, at)
        self._stale = True

    def _neighbours(self) -> tuple[int, int]:
        """Where the cluster before the cursor begins, and where the one behind it ends."""
        before = clusters(self._text[max(0, self._at - MAX_CLUSTER) : self._at])
        behind = clusters(self._text[self._at : self._at + MAX_CLUSTER])
        return self._at - len("".join(before[-1:])), self._at + len("".join(behind[:1]))

    def _recall(self, step: int) -> None:
        to = self._shown + step
        if not 0 <= to <= len(self._history):
            return
        if self._shown == len(self._history):
            self._draft = self._text
        self._shown = to
        self._set(self._draft if to == len(self._history) else self._history[to])

    def _set(self, text: str) -> None:
        self._text, self._at = text, len(text)

    def _refresh(self) -> None:
        if self._stale:
            self._draw()

    def _draw(self) -> None:
        """The row anew: the prompt, the part of the line round the cursor, the cursor in its place."""
        self._stale = False
        room = self.columns - width(self._prompt) - 1
        before, after = self._text[: self._at], self._text[self._at :]
        shown = ""
        for cluster in reversed(clusters(before[-MAX_CLUSTER * room :])):
            if width(cluster + shown) > room:
                break
            shown = cluster + shown
        behind = fitting(after[: MAX_CLUSTER * room], room - width(shown)) if room > width(shown) else ""
        back = width(behind)
        self._write(f"\r{self._prompt}{shown}{behind}\x1b[K" + (f"\x1b[{back}D" if back else ""))
