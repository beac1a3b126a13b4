"""Opens a bundle, checks that it is whole, and reads its sections."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import Groups, Mxfp4Rows, PlainRows, QuantRows, Rows, TernaryRows
from flashd.bundle.errors import BadSection, DamagedRun
from flashd.bundle.file import CardFile, Patience
from flashd.bundle.header import Section, run_rows
from flashd.bundle.prefix import PREFIX, ROWS_OF_A_RUN, digest
from flashd.bundle.rows import codec
from flashd.bundle.rows.bits import unpack
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import BITS, BLOCK, CENTRE_BITS, RowKind, unit_steps
from flashd.bundle.rows.mxfp4 import widened
from flashd.errors import DataError

log = logging.getLogger(__name__)


class Bundle:
    """An open bundle: its header, its checksums, and reads of its sections through the page cache.

    While tokens are made the FFN sections are read by engine/paging/card.py, which bypasses the page cache. If bytes
    do not match their checksum, they are read from the card once more before they are called damaged. `digest` is the
    header's. The header has the digest of all checksums, so two bundles with one digest are equal.

    Args:
        path: the file.
        patience: what a read does while the card is gone. None: it fails at once.

    Raises:
        InputMissing: there is no such file, or it may not be read.
        DataError: the file is not a whole bundle of a version that this flashd knows, see errors.py.
    """

    def __init__(self, path: Path | str, patience: Patience | None = None) -> None:
        self.path = Path(path)
        self.patience = patience or Patience()
        self.file = CardFile(self.path, self.patience)
        try:
            try:
                self._read_header()
            except DataError:
                self.file.forget(0, self.file.size)
                self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def section(self, name: str) -> Section:
        """The section of that name. Raises BadSection if there is none."""
        try:
            return self._at[name]
        except KeyError:
            raise BadSection(f"{self.path}: section {name!r} is missing") from None

    def has(self, name: str) -> bool:
        """Whether there is a section of that name."""
        return name in self._at

    def read(self, name: str) -> bytes:
        """A whole section, checked. Raises BadSection, DamagedRun, CardError."""
        section = self.section(name)
        return self._checked(section, 0, section.length)

    def check(self, section: Section, first_run: int, data: bytes | memoryview) -> None:
        """Checks whole runs of a section, from run `first_run` on. Raises DamagedRun."""
        view = memoryview(data)
        for i, start in enumerate(range(0, len(view), section.run)):
            run = first_run + i
            if digest(view[start : start + section.run]) != self.checksums[section.first + run]:
                raise DamagedRun(
                    f"{self.path}: section {section.name!r} is damaged at byte {section.offset + run * section.run}"
                    f" (run {run} of {section.runs}); copy the bundle again or pack it again"
                )

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A section of float32 numbers, [n]. Raises BadSection, DamagedRun, CardError."""
        return np.frombuffer(self.read(name), np.float32)

    def rows(self, name: str, most: int | None = None, chunk_bytes: int = 4 << 20) -> Rows:
        """The first `most` rows of a section, or all, in arrays of their own.

        Reading them takes about `chunk_bytes` of memory more. Raises BadSection, DamagedRun, CardError.
        """
        section, form = self.section(name), self.header.row_format(name)
        wanted = section.length // form.nbytes if most is None else most
        out = form.empty(wanted)
        carry = b""
        at = 0
        for data in self._checked_runs(section, chunk_bytes, wanted * form.nbytes):
            data = carry + data
            n = min(len(data) // form.nbytes, wanted - at)
            raw = np.frombuffer(data, np.uint8, n * form.nbytes).reshape(n, form.nbytes)
            out[at : at + n].take(form.views(raw))
            carry = data[n * form.nbytes :]
            at += n
        return out

    def table(self, name: str, rows: int, at_once: int) -> Iterator[tuple[int, Rows]]:
        """The first `rows` rows of a table, `at_once` at a time, whole runs: (number of the first, rows).

        Raises BadSection, DamagedRun, CardError.
        """
        section, form = self.section(name), self.header.row_format(name)
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            run = first // ROWS_OF_A_RUN
            length = min(-(-count // ROWS_OF_A_RUN) * section.run, section.length - run * section.run)
            raw = np.frombuffer(self._checked(section, run, length), np.uint8).reshape(-1, form.nbytes)
            yield first, form.views(raw)[:count]

    def groups(self, layer: int, count: int, at_once: int = 16) -> Iterator[tuple[int, Groups]]:
        """The first `count` groups of a layer, up to `at_once` at a time: (number of the first, groups).

        They come in the format of Header.group_of. Raises DamagedRun, CardError.
        """
        as_multiplied = self.header.group_of(layer)
        for part in self.header.ffn_sections_of(layer):
            section, wanted = self.section(part.name), min(part.count, count - part.first)
            for first in range(0, wanted, at_once):
                n = min(at_once, wanted - first)
                following = min(at_once, wanted - first - n)
                data = self._checked(section, first, n * section.run, following * section.run)
                groups = part.form.views(np.frombuffer(data, np.uint8).reshape(n, section.run))
                yield part.first + first, groups if part.form == as_multiplied else part.form.wide(groups)

    def leading(self, layer: int) -> Groups:
        """The groups of the FFN that a layer has in place of experts. Raises DamagedRun, CardError."""
        name = f"layer.{layer}.leading"
        form = self.header.leading_groups[name]
        return form.groups(np.frombuffer(self.read(name), np.uint8).reshape(-1, form.nbytes))

    def all_groups(self, layer: int) -> Groups:
        """Every group of a layer, as products take them. Raises DamagedRun, CardError."""
        every = self.header.model.layer_groups[layer]
        parts = [groups for _, groups in self.groups(layer, every, every)]
        if len(parts) == 1:
            return parts[0]
        joined = [np.concatenate([part.arrays()[i] for part in parts]) for i in range(len(parts[0].arrays()))]
        return parts[0].of(joined)

    def table_rows(self, name: str, which: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows `which` [n] of a table that stays on the card, such as the embeddings -> [n, K] float32.

        A whole run is read for each row. Raises DamagedRun, CardError; DataError if a row does not exist.
        """
        form = self.header.row_format(name)
        raw = b"".join(self.table_record(name, number)[0] for number in which.tolist())
        return dequantise(form.views(np.frombuffer(raw, np.uint8).reshape(-1, form.nbytes)), form.kind)

    def table_record(self, name: str, number: int) -> tuple[bytes, int]:
        """The record of one row of such a table, and how many bytes were read for it. Raises as table_rows does."""
        section, form = self.section(name), self.header.row_format(name)
        if not 0 <= number < section.length // form.nbytes:
            rows = section.length // form.nbytes
            raise DataError(f"{self.path}: {name!r} has no row {number}, only {rows} rows")
        run, row = divmod(number, run_rows(name))
        data = self._checked(section, run, min(section.run, section.length - run * section.run))
        return data[row * form.nbytes : (row + 1) * form.nbytes], len(data)

    def verify(self, on_progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Reads every section and checks every run. `on_progress` is called with how many bytes more are checked.

        Raises DamagedRun for the first run that is wrong; CardError.
        """
        for section in self.header.sections:
            for data in self._checked_runs(section, 4 << 20):
                on_progress(len(data))

    def _checked_runs(self, section: Section, chunk_bytes: int, most: int | None = None) -> Iterator[bytes]:
        """The runs of a section, some at a time, up to the run with byte `most`."""
        runs = max(1, chunk_bytes // section.run)
        end = section.length if most is None else most
        for run in range(0, -(-end // section.run), runs):
            left = section.length - run * section.run
            length = min(runs * section.run, left)
            yield self._checked(section, run, length, min(length, left - length))

    def _checked(self, section: Section, first_run: int, length: int, following: int = 0) -> bytes:
        """Reads and checks whole runs, while the kernel fetches the `following` bytes behind them.

        Raises DamagedRun, CardError.
        """
        offset = section.offset + first_run * section.run
        data = self.file.read(offset, length)
        self.file.read_ahead(offset + length, following)
        try:
            self.check(section, first_run, data)
        except DamagedRun as error:
            log.info("%s; reading it once more", error)
            self.file.forget(offset, length)
            data = self.file.read(offset, length)
            self.check(section, first_run, data)
        return data

    def _read_header(self) -> None:
        size, at = self.file.size, PREFIX.size
        try:
            prefix = codec.decode_prefix(self.file.read(0, min(at, size)), size)
            self.header = codec.decode_header(self.file.read(at, prefix.length), prefix.digest, size)
            self.digest = prefix.digest
        except DataError as error:
            raise type(error)(f"{self.path}: {error}") from error
        self._at = {s.name: s for s in self.header.sections}
        section = self.header.checksums
        table = self.file.read(section.offset, section.length)
        if f"{digest(table):016x}" != self.header.checksums_digest:
            raise DamagedRun(f"{self.path}: the table of checksums is damaged; copy the bundle again")
        self.checksums: npt.NDArray[np.uint64] = np.frombuffer(table, "<u8")


def dequantise(rows: Rows, kind: RowKind) -> npt.NDArray[np.float32]:
    """Rows as [n, K] float32. This is for few rows: the engine multiplies quantised rows in place."""
    if isinstance(rows, PlainRows):
        return rows.w.astype(np.float32)
    if isinstance(rows, TernaryRows):
        return np.asarray((unpack(rows.q, 2).astype(np.float32) - 2) * rows.scale, np.float32)
    if isinstance(rows, Mxfp4Rows):
        return widened(unpack(rows.q, 4), rows.exponent)
    n, blocks = rows.scale.shape
    weights = RowFormat(kind, blocks * BLOCK).weight_bytes
    q = unpack(rows.q[:, :weights], BITS[kind]).reshape(n, blocks, BLOCK).astype(np.float32) - (1 << BITS[kind] - 1)
    scale, centre = steps(rows, kind)
    return np.asarray((q * scale[:, :, None] + centre[:, :, None]).reshape(n, -1), np.float32)


def steps(rows: QuantRows, kind: RowKind) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales and centres [n, B] float32 of quantised rows."""
    blocks, bits = rows.scale.shape[1], CENTRE_BITS[kind]
    top = rows.step.astype(np.float32) * unit_steps(kind)  # [n, 2]
    scale: npt.NDArray[np.float32] = rows.scale * top[:, :1]
    packed = rows.q[:, RowFormat(kind, blocks * BLOCK).weight_bytes :]
    digits = unpack(packed, bits).reshape(len(rows), 2, -1)[:, :, :blocks].astype(np.float32) - (1 << bits - 1)
    centre: npt.NDArray[np.float32] = ((1 << bits) * digits[:, 0] + digits[:, 1]) * top[:, 1:]
    return scale, centre
