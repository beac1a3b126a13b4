"""A model's file, which is read and not mapped: one that shrinks under a mapping kills the process without a word."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from flashd.bundle import header
from flashd.bundle.rows.kinds import Bytes
from flashd.errors import DataError, InputMissing
from flashd.pack.open_model import ALL, Which

CHUNK = 4 << 20
"""Bytes that are read at once of what is read from end to end."""

TYPES: dict[str, npt.DTypeLike] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""What safetensors calls the types of numbers. Of others nothing is read."""


class ModelFile:
    """A file that must stay as it is while it is read. It is opened for each read: a model may have a thousand.

    Its methods raise DataError if it has changed, and InputMissing if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size, self._changed = self._now()

    def fill(self, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Reads what stands at each offset into a view of bytes."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._check(os.fstat(fd))
                for offset, view in parts:
                    while view:
                        if not (n := os.preadv(fd, [view], offset)):
                            self._check(os.fstat(fd))
                            raise DataError(f"{self.path}: ends at byte {offset}; download it again")
                        view, offset = view[n:], offset + n
            finally:
                os.close(fd)
        except OSError as error:
            raise InputMissing(f"{self.path}: {error.strerror}") from error

    def read(self, offset: int, length: int) -> Bytes:
        """[length] bytes."""
        out = np.empty(length, np.uint8)
        self.fill([(offset, out.data)])
        return out

    def chunks(self) -> Iterator[Bytes]:
        """All of it, some bytes at a time; at the end it is known that it was the same all the time."""
        for at in range(0, self.size, CHUNK):
            yield self.read(at, min(CHUNK, self.size - at))
        self.fill([])

    def _now(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise InputMissing(f"{self.path}: {error.strerror}") from error
        return found.st_size, found.st_mtime_ns

    def _check(self, found: os.stat_result) -> None:
        # not the inode's number: FAT gives a file another one from time to time
        if (found.st_size, found.st_mtime_ns) != (self.size, self._changed):
            raise DataError(
                f"{self.path}: changed while it was read, from {self.size} to {found.st_size} bytes; pack it again"
                " when nothing writes to it"
            )


@dataclass(frozen=True)
class FilePart:
    """A tensor in a file, of which is read what is cut out of it."""

    file: ModelFile
    kind: str  # what its file calls the type of its numbers
    dtype: np.dtype[Any] = field(repr=False)
    shape: tuple[int, ...]
    offset: int

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.kind

    def matrix(self, number: int) -> FilePart:
        """One part of those that its first dimension counts. Raises IndexError."""
        if not 0 <= number < self.shape[0]:
            raise IndexError(f"number {number} of {self.shape[0]}")
        return FilePart(self.file, self.kind, self.dtype, self.shape[1:], self.offset + number * self._row_bytes)

    def __getitem__(self, which: Which | EllipsisType | tuple[int | Which, ...]) -> npt.NDArray[Any]:
        """As of an array: everything, rows, or rows of one matrix of a stack, and then columns."""
        part, index = self, which if isinstance(which, tuple) else (which,)
        while index and isinstance(index[0], int):
            part, index = part.matrix(index[0]), index[1:]
        rows = ALL if not index or index[0] is ... else index[0]
        if not part.shape:
            return part.file.read(part.offset, part.dtype.itemsize).view(part.dtype).reshape(())
        return part._rows(rows)[(ALL, *index[1:])]

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape[1:])

    def _rows(self, which: Any) -> npt.NDArray[Any]:
        numbers, nbytes = np.arange(self.shape[0])[which], self._row_bytes
        out = np.empty((len(numbers), nbytes), np.uint8)
        edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        if out.size:
            self.file.fill(
                (self.offset + int(numbers[start]) * nbytes, out[start:stop].reshape(-1).data)
                for start, stop in pairwise(edges)
            )
        return out.reshape(-1).view(self.dtype).reshape(len(numbers), *self.shape[1:])


def read_safetensors(file: ModelFile) -> dict[str, FilePart]:
    """The tensors of a file by their names in it. Raises DataError, InputMissing."""
    try:
        with safe_open(file.path, framework="numpy"):
            """It checks that the header is whole and fits the file. Reads are our own, since it maps the file."""
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file.path}: not a whole safetensors file ({error}); download it again") from error
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    stated = json.loads(file.read(8, length).tobytes())
    stated.pop("__metadata__", None)
    return {
        name: FilePart(
            file, each["dtype"], np.dtype(TYPES.get(each["dtype"], np.uint8)), tuple(each["shape"]),
            8 + length + each["data_offsets"][0],
        )
        for name, each in stated.items()
    }  # fmt: skip


def packed_from(name: str, files: Iterable[ModelFile], on_progress: Callable[[int], None]) -> header.PackedFrom:
    """Name, size and SHA-256 of what a bundle is packed from: its files, one after the other.

    `on_progress` is called with the bytes of each piece. Raises what ModelFile does.
    """
    sha, size = hashlib.sha256(), 0
    for file in files:
        for data in file.chunks():
            sha.update(data.data)
            size += len(data)
            on_progress(len(data))
    return header.PackedFrom(name=name, nbytes=size, sha256=sha.hexdigest())
