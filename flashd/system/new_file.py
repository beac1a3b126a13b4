"""A file that appears whole or not at all. It gets its name when all of it is on the disk."""

from __future__ import annotations

import errno
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

    Args:
        path: where it will be.
        mode: its permissions, less the umask.
        folder: a descriptor of the folder, from who must not be led elsewhere by a path; else it is that of `path`.

    Raises CannotWrite when the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path, mode: int = 0o644, folder: int | None = None) -> None:
        self.path = path
        self._mode = mode
        self._temporary = f".{path.name}.{os.getpid()}.partial"
        self._named = False
        self._folder = self._guard(lambda: self._open_folder(folder))
        try:
            self._fd = self._guard(self._open)
        except BaseException:
            os.close(self._folder)
            raise

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if self._named:
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._folder)
        os.close(self._folder)

    def fileno(self) -> int:
        """The descriptor, for who reads what was written."""
        return self._fd

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes `data` at byte `offset`. Raises CannotWrite."""
        self._guard(lambda: self._write(memoryview(data), offset))

    def settle(self) -> None:
        """Waits until the device has what was written so far. Raises CannotWrite."""
        self._guard(lambda: os.fdatasync(self._fd))

    def publish(self) -> None:
        """Flushes the file to the device and gives it its name. Raises CannotWrite."""
        self._guard(self._publish)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            n = os.pwrite(self._fd, data, offset)
            data, offset = data[n:], offset + n

    def _open_folder(self, folder: int | None) -> int:
        if folder is not None:
            return os.dup(folder)
        return os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _open(self) -> int:
        self._sweep()
        try:
            return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, self._mode, dir_fd=self._folder)
        except OSError as error:
            # FAT, which USB sticks have, has no unnamed files
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        fd = os.open(self._temporary, flags, self._mode, dir_fd=self._folder)
        self._named = True
        return fd

    def _sweep(self) -> None:
        """Removes what a killed process has left of the same file."""
        for name in os.listdir(self._folder):  # noqa: PTH208 (a descriptor)
            owner = re.fullmatch(rf"\.{re.escape(self.path.name)}\.(\d+)\.partial", name)
            if owner and (int(owner[1]) == os.getpid() or not Path(f"/proc/{owner[1]}").exists()):
                with suppress(OSError):  # a folder of that name, or another user's file, is in nobody's way
                    os.unlink(name, dir_fd=self._folder)

    def _publish(self) -> None:
        os.fsync(self._fd)
        if not self._named:
            # link(2) does not replace a file and rename(2) does: first a name, then the right one.
            # The dir_fd makes Python call linkat(2), the one that follows /proc's link to the file.
            os.link(f"/proc/self/fd/{self._fd}", self._temporary, dst_dir_fd=self._folder)
            self._named = True
        os.rename(self._temporary, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._named = False
        os.fsync(self._folder)

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
