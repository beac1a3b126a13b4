"""Writes a bundle file: sections in order, header last, and nothing to be seen before all of it is on the card."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import flashd
from flashd.bundle import codec, prefix
from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Formats, Header, Narrowed, PackedFrom, Section, Selection, Text
from flashd.bundle.prefix import PAGE, PLAIN_RUN
from flashd.errors import CannotWrite
from flashd.system.new_file import NewFile

HEADER_RESERVE = 512 << 10


class BundleWriter:
    """A context manager: adds sections, then `finish` puts the whole file in its place at once.

    A cut leaves the old file or none, see NewFile.

    Raises CannotWrite when the disk is full or the folder cannot be written.
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
        self._at = prefix.next_page(self._at)

    def finish(
        self, *, model: Architecture, formats: Formats, text: Text, source: PackedFrom,
        selection: Selection | None = None, narrowed: Narrowed | None = None,
    ) -> Header:  # fmt: skip
        """Writes checksums and header, flushes all to the device and gives the file its name."""
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
            raise CannotWrite(f"{self.path}: a header of {len(head)} bytes; {HEADER_RESERVE} at most")
        self._file.write(head, 0)
        # What was written must read back as what was meant, before it replaces anything.
        codec.decode_header(head[prefix.PREFIX.size :], prefix.digest(head[prefix.PREFIX.size :]), self._at)
        self._file.publish()
        return header

    def _write_runs(self, data: memoryview, run: int) -> None:
        self._checksums.extend(prefix.digest(data[i : i + run]) for i in range(0, len(data), run))
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data, self._at)
        self._at += len(data)
