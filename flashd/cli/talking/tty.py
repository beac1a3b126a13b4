"""Makes a serial line the terminal of this process, as a getty does for a login."""

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
"""The speeds that a terminal can have, in bits a second."""


@contextmanager
def as_terminal(port: Path, speed: int) -> Iterator[None]:
    """Standard input and output are the line inside the block, and so is Python's standard error.

    Descriptor 2 stays as it was, for the error that ends the process. Ctrl-C on the line interrupts. The block ends
    if the line goes away.

    Args:
        port: the line's device.
        speed: bits a second, one of SPEEDS.

    Raises:
        InputMissing: the line cannot be opened.
        Busy: another program has it.
        UsageError: it is not a serial line, or cannot have this speed, or cannot be this process's terminal.
    """
    if speed not in SPEEDS:
        raise UsageError(f"--speed {speed} is not a speed of serial lines; the usual ones are 9600, 38400 and 115200")
    if os.getsid(0) != os.getpid():
        try:
            os.setsid()
        except PermissionError as error:
            raise UsageError(
                "--port needs a session of its own; start flashd-serial@NAME, or start this with setsid"
            ) from error
    try:
        # not blocking, so that a line without carrier can be opened too
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
    # new text streams, so that neither the locale nor the old streams' kind of file matters
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
    """Locks the line, and only then changes its settings."""
    if not os.isatty(fd):
        raise UsageError(f"{port}: this is not a serial line")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    except OSError as error:
        raise Busy(
            f"{port}: another program has it; look if /etc/flashd/flashd.yaml names it, or if a getty runs on it"
        ) from error
    # no key has a meaning of its own: noise on a line that looks like Ctrl-S would stop the talk
    keys = [b"\0"] * len(termios.tcgetattr(fd)[6])
    rate = getattr(termios, f"B{speed}")
    termios.tcsetattr(
        fd, termios.TCSANOW,
        [
            termios.IGNBRK | termios.ICRNL | termios.IMAXBEL,
            termios.OPOST | termios.ONLCR,
            termios.CS8 | termios.CREAD | termios.CLOCAL,
            0,
            rate, rate, keys,
        ],
    )  # fmt: skip
