"""An open folder and the files in it, for root where others may write: no link is followed, and nothing but a plain
file is opened.

A folder is held by its descriptor. So whoever puts a link in the place of a folder or a file leads nobody elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path
from types import TracebackType

from flashd.system.new_file import NewFile

CHUNK = 4 << 20
"""Bytes that are copied at once."""

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open folder. Its methods raise OSError, and FileNotFoundError if a file is not there.

    Args:
        path: for messages.
        fd: its descriptor, which it closes.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    @classmethod
    def at(cls, path: Path, below: tuple[str, ...] = ()) -> Folder:
        """The folder at `path`, which is trusted, or one below it, to which no link may lead."""
        folder = cls(path, os.open(path, FOLDER))
        for name in below:
            with folder:
                folder = cls(folder.path / name, os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=folder.fd))
        return folder

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def open(self, name: str) -> BufferedReader:
        """A plain file, to be read. A link, a pipe or a device is not even opened."""
        # O_PATH finds a file and does not open it: a device would notice that
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise OSError(errno.EINVAL, "not a file but a link, a folder, a pipe or a device")
            # /proc leads to the very file that was found, whatever has its name by now
            return os.fdopen(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC), "rb")
        finally:
            os.close(found)

    def read(self, name: str, most: int) -> bytes:
        """At most `most` bytes of a file and one more, which says that there are too many."""
        with self.open(name) as file:
            return file.read(most + 1)

    def has(self, name: str) -> bool:
        """Whether a file is there. Raises OSError if it is something else."""
        try:
            self.open(name).close()
        except FileNotFoundError:
            return False
        return True

    def holds(self, name: str, nbytes: int, sha256: str) -> bool:
        """Whether a file is there and has these bytes. One of another size is not read."""
        try:
            with self.open(name) as file:
                return os.fstat(file.fileno()).st_size == nbytes and sha256_of(file) == sha256
        except FileNotFoundError:
            return False

    def new(self, name: str) -> NewFile:
        """A file that will take the place of what is called `name`. Raises CannotWrite."""
        return NewFile(self.path / name, folder=self.fd)

    def keep(self, name: str) -> None:
        """Gives a file another name, NAME.old: no copy is made, and at no moment has it no name."""
        fresh = f"{old_name(name)}.new"
        self.remove(fresh)
        os.link(name, fresh, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        os.rename(fresh, old_name(name), src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.remove(fresh)  # rename(2) leaves both names if they are one file's already

    def put_back(self, name: str) -> None:
        """Gives NAME.old its name again."""
        os.rename(old_name(name), name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return

    def sync(self) -> None:
        """Flushes the folder's names to the device."""
        os.fsync(self.fd)


def old_name(name: str) -> str:
    return f"{name}.old"


def sha256_of(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
