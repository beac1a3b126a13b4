"""A file that appears whole or not at all. It gets its name when all of it is on the disk."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from flashd.errors import CannotWrite

R = TypeVar("R")


class NewFile:
    """A context manager. Call `write`, then `publish`, which puts the file in the place of the old one.

    While it grows the file has no name (O_TMPFILE), if the file system can do that. If not, it has a temporary name.
    Such a file is removed when the block is left, or by the next NewFile of that path if the process was killed. If
    writing is interrupted, the old file stays as it is.

    Raises CannotWrite if the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self.path = path
        self._mode = mode
        self._folder = path.absolute().parent
        self._temporary = self._folder / f".{path.name}.{os.getpid()}.partial"
        self._named = False
        self._fd = self._guard(self._open)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if self._named:
            with suppress(OSError):
                self._temporary.unlink()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes `data` at byte `offset`. Raises CannotWrite."""
        self._guard(lambda: self._write(memoryview(data), offset))

    def publish(self) -> None:
        """Flushes the file to the device and gives it its name. Raises CannotWrite."""
        self._guard(self._publish)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            n = os.pwrite(self._fd, data, offset)
            data, offset = data[n:], offset + n

    def _open(self) -> int:
        self._sweep()
        try:
            return os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, self._mode)
        except OSError as error:
            # FAT, which USB sticks have, has no unnamed files
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        fd = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, self._mode)
        self._named = True
        return fd

    def _sweep(self) -> None:
        """Removes temporary files of the same path that killed processes have left."""
        for left in self._folder.glob(f".{glob.escape(self.path.name)}.*.partial"):
            owner = re.fullmatch(r"(\d+)\.partial", left.name.removeprefix(f".{self.path.name}."))
            if owner and (int(owner[1]) == os.getpid() or not Path(f"/proc/{owner[1]}").exists()):
                left.unlink(missing_ok=True)

    def _publish(self) -> None:
        os.fsync(self._fd)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._named:
                # link(2) does not replace a file but rename(2) does, so the file first gets a temporary name.
                # With dir_fd Python calls linkat(2), which follows the link in /proc to the file.
                os.link(f"/proc/self/fd/{self._fd}", self._temporary.name, dst_dir_fd=folder)
                self._named = True
            self._temporary.rename(self.path)
            self._named = False
            os.fsync(folder)
        finally:
            os.close(folder)

    def _guard(self, action: Callable[[], R]) -> R:
        try:
            return action()
        except OSError as error:
            what = (
                "the disk is full; free some space or write elsewhere"
                if error.errno == errno.ENOSPC
                else error.strerror
            )
            raise CannotWrite(f"{self.path}: {what}") from error


def sync_folder(path: Path) -> None:
    """Flushes a folder's names to the device."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
