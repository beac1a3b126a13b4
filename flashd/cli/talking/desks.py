"""Where a person sits who talks with the model: at a terminal, or behind a pipe."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from flashd.cli.talking.said import Said
from flashd.cli.talking.talk import Desk
from flashd.errors import DataError
from flashd.system.printable import printable
from flashd.terminal.line_editor import Key, LineEditor
from flashd.terminal.wrapping import Wrap

COLUMNS, FEWEST_COLUMNS = 80, 20
"""The width of a terminal that does not tell it, and the least that the editor works with."""


@contextmanager
def desk(at_once: bool) -> Iterator[Desk]:
    """The person's terminal, or a pipe if there is none.

    Args:
        at_once: whether Ctrl-C raises KeyboardInterrupt in the middle of an answer. Else whoever answers looks at
            `Said.stopped`.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        with Terminal(at_once) as terminal:
            yield terminal
    else:
        yield Pipe()


class Terminal:
    """A terminal on descriptors 0 and 1: an editor for what is typed, and rows of whole words for what is said.

    While somebody types, Ctrl-C is a key like others. While an answer comes it is a signal, and what is typed
    meanwhile stays in the kernel's buffer until the next line.
    """

    def __init__(self, at_once: bool) -> None:
        self._at_once = at_once
        self._editor = LineEditor(self._write, COLUMNS)
        self._wrap = Wrap(COLUMNS)
        self._ahead = b""
        self._said: Said | None = None  # the answer that Ctrl-C would stop

    def __enter__(self) -> Terminal:
        self._before = termios.tcgetattr(0)
        self._handler = signal.signal(signal.SIGINT, self._on_interrupt)
        self._set_keys(interrupt=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._handler)
        with suppress(termios.error):  # the terminal went away
            termios.tcsetattr(0, termios.TCSADRAIN, self._before)

    # --- the person's lines -------------------------------------------------------------------------------

    def next_line(self) -> str | None:
        """What was typed up to Enter. None at Ctrl-D, or if the terminal went away."""
        self._editor.columns = _columns()
        self._editor.start()
        while data := self._ahead or self._read():
            entry, self._ahead = self._editor.next(data)
            if entry is Key.INTERRUPT:
                self._editor.start()
            elif entry is Key.END:
                self._write("\r\n")
                return None
            elif entry is not None:
                return entry.strip()
        return None

    def _read(self) -> bytes:
        try:
            return os.read(0, 4096)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""  # the terminal went away

    # --- an answer ----------------------------------------------------------------------------------------

    def answer(self, said: Said, work: Callable[[], None]) -> None:
        """Runs `work`, which shows its answer with `say`. Ctrl-C sets `said.stopped`."""
        self._wrap = Wrap(_columns())
        self._set_keys(interrupt=True)
        try:
            try:
                self._said = said
                self._look_ahead(said)
                if not said.stopped:
                    work()
            finally:
                self._said = None
        except KeyboardInterrupt:  # the one that _on_interrupt raised
            pass
        finally:
            self._set_keys(interrupt=False)
            if said.shown:
                self._write(self._wrap.finish() + "\r\n")

    def say(self, piece: str) -> None:
        self._write(self._wrap.push(piece))

    def note(self, text: str) -> None:
        wrap = Wrap(_columns())
        self._write(wrap.push(text) + wrap.finish() + "\r\n")

    def greet(self, text: str) -> None:
        self.note(text)

    def _look_ahead(self, said: Said) -> None:
        """Takes up what came before Ctrl-C was a signal."""
        while select.select([0], [], [], 0)[0] and (data := self._read()):
            self._ahead += data
        _, stop, behind = self._ahead.rpartition(b"\x03")
        if stop:
            self._ahead = behind
            said.stopped = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._said is None:
            return
        self._said.stopped = True
        if self._at_once:
            self._said = None  # once: a second one would come while the first is dealt with
            raise KeyboardInterrupt

    # --- the line -----------------------------------------------------------------------------------------

    def _set_keys(self, interrupt: bool) -> None:
        """Keys come one by one and are not echoed. None but Ctrl-C has a meaning, and that only if `interrupt`."""
        mode = [*self._before]
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN | termios.ISIG)
        if interrupt:
            mode[3] |= termios.ISIG | termios.NOFLSH
        keys: list[bytes | int] = [b"\0"] * len(self._before[6])
        keys[termios.VINTR], keys[termios.VMIN], keys[termios.VTIME] = b"\x03", 1, 0
        mode[6] = keys
        with suppress(termios.error):  # the terminal went away, which the next read says
            termios.tcsetattr(0, termios.TCSADRAIN, mode)

    def _write(self, text: str) -> None:
        # past sys.stdout, which takes the editor's control sequences out
        sys.stdout.flush()
        data = text.replace("\r\n", "\n").encode("utf-8", "replace")
        while data:
            data = data[os.write(1, data) :]


class Pipe:
    """Lines from standard input, as another program writes them; the answers to standard output."""

    def next_line(self) -> str | None:
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return None
        except UnicodeDecodeError as error:
            raise DataError(f"the prompt is not UTF-8 (byte {error.start}); send UTF-8 text") from error
        return checked(line).strip() if line else None

    def answer(self, said: Said, work: Callable[[], None]) -> None:
        try:
            work()
        except KeyboardInterrupt:
            said.stopped = True
        finally:
            if said.shown:
                print(flush=True)

    def say(self, piece: str) -> None:
        print(piece, end="", flush=True)

    def note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    def greet(self, text: str) -> None:
        """Nobody is there."""


def checked(text: str) -> str:
    """The prompt. Raises DataError if it is not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not UTF-8 (character {error.start}); send UTF-8 text") from error
    return text


def _columns() -> int:
    try:
        found = os.get_terminal_size(1).columns
    except OSError:  # the terminal is gone
        found = 0
    return max(FEWEST_COLUMNS, found or COLUMNS)
