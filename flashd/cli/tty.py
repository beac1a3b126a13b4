"""A serial line as the terminal of this process: what a getty does, for one that only asks."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from flashd.errors import Busy, InputMissing, UsageError
from flashd.system.printable import plain

SPEEDS = sorted(int(name[1:]) for name in dir(termios) if name[0] == "B" and name[1:].isdigit() and name != "B0")
"""Bits a second that a terminal can be set to."""

IUTF8 = 0o40000
"""Backspace takes a character and not a byte; Python's termios does not name it."""

KEYS = {
    termios.VINTR: b"\x03", termios.VEOF: b"\x04", termios.VERASE: b"\x7f", termios.VKILL: b"\x15",
    termios.VWERASE: b"\x17", termios.VMIN: b"\x01",
}  # fmt: skip
"""Keys with a meaning. No others: a Ctrl-S or Ctrl-\\ in the noise of a line would end or stop the talk."""


@contextmanager
def as_terminal(port: Path, speed: int) -> Iterator[None]:
    """Standard input and output are the line, and so is what is said on standard error within.

    Descriptor 2 stays what it was, for what ends the process. Ctrl-C on the line interrupts. A line that goes away
    ends the block.

    Args:
        port: the line's device.
        speed: bits a second, one of SPEEDS.

    Raises:
        InputMissing: it cannot be opened.
        Busy: another program has it.
        UsageError: it is no serial line, the speed is none, or this process cannot have a terminal of its own.
    """
    if speed not in SPEEDS:
        raise UsageError(f"--speed {speed} is none that a line has; usual are 9600, 38400 and 115200")
    if os.getsid(0) != os.getpid():
        try:
            os.setsid()
        except PermissionError as error:
            raise UsageError("--port takes a session of its own: start flashd-serial@NAME, or use setsid") from error
    try:
        # not blocking: a line without carrier is opened all the same
        fd = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise InputMissing(f"{port}: {error.strerror}") from error
    try:
        _take(fd, port, speed)
        os.set_blocking(fd, True)
        for standard in (0, 1):
            os.dup2(fd, standard)
    finally:
        os.close(fd)
    # text streams anew: whatever the locale says, and none that thinks itself a file
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "closefd": False}
    try:
        with (
            open(0, **text) as asked,
            open(1, "w", **text) as said,
            redirect_stdout(plain(said)),
            redirect_stderr(said),
        ):
            before, sys.stdin = sys.stdin, asked
            try:
                yield
            finally:
                sys.stdin = before
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _take(fd: int, port: Path, speed: int) -> None:
    """Locks the line before anything of it is changed."""
    if not os.isatty(fd):
        raise UsageError(f"{port}: no serial line")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    except OSError as error:
        raise Busy(f"{port}: another program has it; does flashd.yaml name it, or does a getty run there?") from error
    keys = [KEYS.get(i, b"\0") for i in range(len(termios.tcgetattr(fd)[6]))]
    rate = getattr(termios, f"B{speed}")
    termios.tcsetattr(
        fd, termios.TCSANOW,
        [
            termios.IGNBRK | termios.ICRNL | termios.IMAXBEL | IUTF8,
            termios.OPOST | termios.ONLCR,
            termios.CS8 | termios.CREAD | termios.CLOCAL,
            termios.ISIG | termios.ICANON | termios.IEXTEN | termios.ECHO | termios.ECHOE | termios.ECHOK
            | termios.ECHOCTL | termios.ECHOKE,
            rate, rate, keys,
        ],
    )  # fmt: skip
