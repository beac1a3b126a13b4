"""Writes a bundle file: sections in order, header last, and nothing to be seen before all of it is on the card."""

from __future__ import annotations

import errno
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import flashd
from flashd.bundle import layout
from flashd.bundle.layout import PAGE, PLAIN_RUN, Formats, Header, Model, Section, Source, Text
from flashd.errors import CannotWrite

R = TypeVar("R")

HEADER_RESERVE = 512 << 10


class BundleWriter:
    """A context manager: adds sections, then `finish` puts the whole file in its place at once.

    The file has no name while it grows (O_TMPFILE) where the file system can do that; elsewhere it has a
    temporary one that is removed on any exit but a kill. A cut leaves the old file or none.

    Raises CannotWrite when the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sections: list[Section] = []
        self._checksums = array("Q")
        self._temporary: Path | None = None
        self._fd = self._guard(self._open)
        self._at = HEADER_RESERVE

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                self._temporary.unlink()

    def add(self, name: str, chunks: Iterable[bytes | memoryview], run: int = PLAIN_RUN) -> None:
        """Appends a section. Chunks may be of any length; only `run` bytes are held beside them."""
        start, first = self._at, len(self._checksums)
        pending = bytearray()
        for chunk in chunks:
            pending += chunk
            whole = len(pending) // run * run
            if whole:
                self._write_runs(memoryview(pending)[:whole], run)
                pending = pending[whole:]
        if pending:
            self._write_runs(memoryview(pending), run)
        self._sections.append(Section(name=name, offset=start, length=self._at - start, run=run, first=first))
        self._at = layout.align(self._at)

    def finish(self, *, model: Model, formats: Formats, text: Text, source: Source) -> Header:
        """Writes checksums and header, flushes all to the device and gives the file its name."""
        table = self._checksums.tobytes()
        checksums = Section(
            name="checksums", offset=self._at, length=len(table), run=PAGE, first=len(self._checksums)
        )
        header = Header(
            flashd=flashd.__version__, model=model, formats=formats, text=text, source=source,
            sections=self._sections, checksums=checksums, checksums_digest=f"{layout.digest(table):016x}",
        )  # fmt: skip
        self._write(table)
        head = layout.encode(header, self._at)
        if len(head) > HEADER_RESERVE:
            raise CannotWrite(f"{self.path}: a header of {len(head)} bytes; {HEADER_RESERVE} at most")
        self._guard(lambda: self._put(memoryview(head), 0))
        # What was written must read back as what was meant, before it replaces anything.
        layout.decode_header(head[layout.PREFIX.size :], layout.digest(head[layout.PREFIX.size :]), self._at)
        self._guard(self._publish)
        return header

    def _write_runs(self, data: memoryview, run: int) -> None:
        self._checksums.extend(layout.digest(data[i : i + run]) for i in range(0, len(data), run))
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._guard(lambda: self._put(memoryview(data), self._at))
        self._at += len(data)

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            n = os.pwrite(self._fd, data, offset)
            data, offset = data[n:], offset + n

    def _open(self) -> int:
        folder = self.path.absolute().parent
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            # FAT, which USB sticks have, knows no unnamed files
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        fd, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".partial", dir=folder)
        self._temporary = Path(name)
        os.fchmod(fd, 0o644)
        return fd

    def _publish(self) -> None:
        os.fsync(self._fd)
        folder = os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if self._temporary is None:
                # link(2) does not replace a file and rename(2) does: first a name, then the right one.
                # The dir_fd makes Python call linkat(2), the one that follows /proc's link to the file.
                named = self.path.absolute().with_name(f".{self.path.name}.{os.getpid()}.partial")
                named.unlink(missing_ok=True)
                os.link(f"/proc/self/fd/{self._fd}", named.name, dst_dir_fd=folder)
                self._temporary = named
            self._temporary.rename(self.path)
            self._temporary = None
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
