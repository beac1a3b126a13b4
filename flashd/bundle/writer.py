"""Writes a bundle: sections in order, the header last. The file appears only when all of it is on the disk."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import flashd
from flashd.bundle import prefix
from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Header, Narrowed, PackedFrom, Section, Selection, Text
from flashd.bundle.prefix import PAGE, PLAIN_RUN
from flashd.bundle.rows import codec
from flashd.bundle.rows.of_matrices import Formats
from flashd.errors import CannotWrite
from flashd.system.new_file import NewFile

HEADER_RESERVE = 512 << 10
"""Bytes at the beginning of the file that are kept free for prefix and header."""


class BundleWriter:
    """A context manager. `add` appends sections, then `finish` puts the whole file in its place at once.

    If it is interrupted, the old file stays as it is, see NewFile. Raises CannotWrite if the disk is full or the
    folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sections: list[Section] = []
        self._checksums = array("Q")
        self._file = NewFile(path)
        self._at = HEADER_RESERVE

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def add(self, name: str, chunks: Iterable[bytes | memoryview], run: int = PLAIN_RUN) -> None:
        """Appends a section. Chunks may have any length. At most a chunk and a run are held in memory."""
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
        self._at = prefix.next_page(self._at)

    def finish(
        self, *, model: Architecture, formats: Formats, text: Text, source: PackedFrom,
        selection: Selection | None = None, narrowed: Narrowed | None = None,
    ) -> Header:  # fmt: skip
        """Writes checksums and header, flushes the file to the device and gives it its name."""
        table = self._checksums.tobytes()
        checksums = Section(
            name="checksums", offset=self._at, length=len(table), run=PAGE, first=len(self._checksums)
        )
        header = Header(
            flashd=flashd.__version__, model=model, formats=formats, text=text, source=source,
            sections=self._sections, checksums=checksums, checksums_digest=f"{prefix.digest(table):016x}",
            selection=selection, narrowed=narrowed,
        )  # fmt: skip
        self._write(table)
        head = codec.encode(header, self._at)
        if len(head) > HEADER_RESERVE:
            raise CannotWrite(f"{self.path}: a header of {len(head)} bytes; at most {HEADER_RESERVE} are allowed")
        self._file.write(head, 0)
        # The header must be readable before the file replaces anything.
        codec.decode_header(head[prefix.PREFIX.size :], prefix.digest(head[prefix.PREFIX.size :]), self._at)
        self._file.publish()
        return header

    def _write_runs(self, data: memoryview, run: int) -> None:
        self._checksums.extend(prefix.digest(data[i : i + run]) for i in range(0, len(data), run))
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data, self._at)
        self._at += len(data)
