"""Reads of a file on a card that may be pulled, decay or be overwritten. They notice it, and go on if they can.

If a device goes away, its file system never answers an open descriptor again, even when the card is put back. So a
read that fails opens the path again, and goes on if the very same file is there. If it then fails once more, that
place of the card is bad.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flashd.bundle.prefix import PAGE, PREFIX
from flashd.errors import CardError, InputMissing

log = logging.getLogger(__name__)

Got = TypeVar("Got", int, bytes)

RETRY_SECONDS = 0.25
"""Seconds between two looks for a card that is gone."""

READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""For a file that waits for nobody: a pipe in its place would be opened only when somebody writes."""

KERNEL_PAGE = max(PAGE, mmap.PAGESIZE)
"""Bytes of a page of the page cache: 16 KiB on a Raspberry Pi 5. Less cannot be forgotten."""


@dataclass
class Patience:
    """How long a failed read waits for the card to come back, and what it does meanwhile."""

    seconds: float = 0.0
    while_waiting: Callable[[], None] = lambda: None
    """Is called again and again by the thread that reads. It may raise to give up."""


class CardFile:
    """An open file. Several threads may read it at once.

    Args:
        path: where the file is, and where it is looked for again.
        patience: what a read that fails does.
        direct: bypass the page cache, if the file system can. Offsets are then multiples of PAGE.
        opened: another CardFile of the same file, which is opened in another way.

    Raises InputMissing if there is no such file or it may not be read.
    """

    def __init__(
        self, path: Path, patience: Patience, *, direct: bool = False, opened: CardFile | None = None
    ) -> None:
        self.path = path
        self._patience = patience
        self._lock = threading.Lock()
        self._asked_direct = direct
        self._direct = False
        self._fd: int = -1
        self.size: int = 0
        self._identity: bytes = b""  # the prefix: it has the file's length and its header's digest
        try:
            if opened is not None:
                # through /proc: the path may lead to another file by now
                self._fd = self._open(f"/proc/self/fd/{opened._fd}", direct)
                self.size, self._identity = opened.size, opened._identity
                return
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputMissing(f"{path}: is not a file")
            self._fd = self._open(str(path), direct)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(errno.EINVAL, "is not a file any more")
            self.size, self._identity = os.fstat(self._fd).st_size, os.pread(self._fd, PREFIX.size, 0)
        except OSError as error:
            self.close()
            raise InputMissing(f"{path}: {error.strerror}") from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises CardError."""
        parts = []
        while length:
            part = self._attempt(os.pread, length, offset)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fill(self, view: memoryview, offset: int, needed: int) -> tuple[int, int]:
        """Reads into `view` from `offset` of the file on, at least up to byte `needed` of the file.

        Returns how many reads that took and how many bytes came. Raises CardError.
        """
        at, reads, nbytes = offset, 0, 0
        while at < needed:
            n = self._attempt(os.preadv, [view[at - offset :]], at)
            reads, nbytes = reads + 1, nbytes + n
            if self._direct and at + n < needed:
                whole = n // PAGE * PAGE  # the next read must start on a page too
                if whole == 0:
                    raise self._ended(at + n)
                n = whole
            at += n
        return reads, nbytes

    def read_ahead(self, offset: int, length: int) -> None:
        """Asks the kernel to fetch what is read next. If it cannot, the read itself fails later."""
        if length > 0:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def forget(self, offset: int, length: int) -> None:
        """Takes bytes out of the page cache. They come from the card when they are read again."""
        _forget(self._fd, offset, length)

    # --- inside -------------------------------------------------------------------------------------------

    def _attempt(self, call: Callable[[int, Any, int], Got], what: Any, at: int) -> Got:
        """One read that gives at least one byte. It is tried again as long as patience lasts. Raises CardError."""
        until: float | None = None
        buffered = opened_again = False
        while True:
            try:
                got = call(self._fd, what, at)
                if got:
                    return got
                if os.fstat(self._fd).st_size <= at:
                    raise self._ended(at)
                raise OSError(errno.EIO, "nothing came")
            except OSError as error:
                if error.errno == errno.EINVAL and self._asked_direct and not buffered:
                    buffered = True
                    if self._read_buffered():
                        continue
                until = time.monotonic() + self._patience.seconds if until is None else until
                failed = f"{self.path}: reading at byte {at}: {error.strerror}"
                if not self._open_again():
                    self._wait(until, failed, error)
                elif opened_again:
                    raise CardError(
                        f"{failed}, though the card is there; write the file again, to another card if you can"
                    ) from error
                opened_again = True

    def _wait(self, until: float, what: str, error: OSError) -> None:
        """Returns when the same file can be opened again. Raises CardError if that takes too long."""
        said = False
        while True:
            if time.monotonic() >= until:
                waited = f" within {self._patience.seconds:g} s" if self._patience.seconds else ""
                raise CardError(f"{what}; is the card in place? It did not come back{waited}") from error
            if not said:
                log.warning("%s; waiting %g s for the card", what, self._patience.seconds)
                said = True
            self._patience.while_waiting()
            time.sleep(RETRY_SECONDS)
            if self._open_again():
                log.warning("%s: is there again", self.path)
                return

    def _open_again(self) -> bool:
        """Opens the path again. Returns whether the same file is there, which is then read."""
        try:
            fd = os.open(self.path, READ)
        except OSError:
            return False
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return False
            _forget(fd, 0, PREFIX.size)  # the kernel may still have the prefix of a card that is gone
            if os.fstat(fd).st_size != self.size or os.pread(fd, PREFIX.size, 0) != self._identity:
                return False
            self._replace(fd, self._direct)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _read_buffered(self) -> bool:
        """Goes over to reads through the page cache: the file system cannot read directly after all.

        Returns whether the file is still there.
        """
        with self._lock:
            if not self._direct:
                return True
        self._say_buffered()
        try:
            self._replace(self._fd, False)
        except OSError:
            return False
        return True

    def _replace(self, fd: int, direct: bool) -> None:
        """Reads the file behind `fd` from now on. The descriptor's number stays: another thread may be using it."""
        with self._lock:
            fresh = self._open(f"/proc/self/fd/{fd}", direct)
            os.dup2(fresh, self._fd, inheritable=False)
            os.close(fresh)

    def _open(self, path: str, direct: bool) -> int:
        self._direct = direct
        if direct:
            try:
                return os.open(path, READ | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._say_buffered()
            self._direct = False
        fd = os.open(path, READ)
        if not self._asked_direct:
            # no read-ahead by the kernel: it would guess, and read past the end of what is wanted
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    def _say_buffered(self) -> None:
        log.warning("%s: no direct reads on this file system; reading through the page cache", self.path)

    def _ended(self, at: int) -> CardError:
        return CardError(f"{self.path}: the file ends at byte {at}; was it replaced?")


def _forget(fd: int, offset: int, length: int) -> None:
    start = offset // KERNEL_PAGE * KERNEL_PAGE  # the kernel keeps a page if only a part of it is named
    end = -(-(offset + length) // KERNEL_PAGE) * KERNEL_PAGE
    os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
