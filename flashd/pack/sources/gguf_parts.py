"""Opens a GGUF file, or all parts of one that is split, through the gguf package."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import numpy.typing as npt

from flashd.errors import DataError, InputMissing
from flashd.pack.model_file import FilePart, ModelFile

MOST_ENTRIES = 1 << 21
"""Of a list in a model's metadata. The longest there are, of merges, have some hundred thousand."""

LONGEST = 64 << 20
"""Bytes of a string. The longest there are, of tokenizers, have some millions."""

MOST_PARTS = 1000

PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
"""The name of a part, as llama.cpp's gguf-split gives it."""


READ_AT_ONCE = 1 << 20
"""Bytes of the metadata, which come in pieces of a few."""


LENGTH = struct.Struct("=Q")
"""How many bytes a string has, in front of it."""


class Reader(gguf.GGUFReader):
    """The gguf package's reader, which reads the file in place of mapping it. Its tensors' data are FileParts.

    Its base takes numbers behind the end of the file for nothing, as many as a list says. Raises ValueError there;
    what ModelFile raises.
    """

    def __init__(self, path: Path) -> None:
        self.file = ModelFile(path)
        self._piece, self._start = np.empty(0, np.uint8), 0
        self._tensors_begun = False
        super().__init__(path)
        self._piece = np.empty(0, np.uint8)

    @property
    def data(self) -> Any:
        raise AssertionError("the file is not mapped")

    @data.setter
    def data(self, value: np.memmap[Any, Any]) -> None:
        """The base maps the file; nothing is read of that."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        kind, count = np.dtype(dtype), int(count)
        offset, nbytes = int(offset), kind.itemsize * count
        if offset + nbytes > self.file.size:
            raise ValueError(f"cut short at {self.file.size} bytes")
        if self._tensors_begun:
            return np.broadcast_to(np.zeros(1, kind), count)  # its shape is all that is needed
        if not self._start <= offset <= offset + nbytes <= self._start + len(self._piece):
            length = min(max(nbytes, READ_AT_ONCE), self.file.size - offset)
            self._piece, self._start = self.file.read(offset, length), offset
        at = offset - self._start
        order = self.byte_order if override_order is None else override_order
        return self._piece[at : at + nbytes].view(kind.newbyteorder(order))

    def _get_str(self, offset: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        length = self._get(offset, np.uint64)
        return length, self._get(offset + length.nbytes, np.uint8, _bounded(int(length[0])))

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        self._tensors_begun = True
        super()._build_tensors(start_offs, fields)
        self.tensors = [each._replace(data=cast(Any, self._data_of(each))) for each in self.tensors]

    def _data_of(self, tensor: gguf.ReaderTensor) -> FilePart:
        shaped = tensor.data
        return FilePart(self.file, tensor.tensor_type.name, shaped.dtype, shaped.shape, tensor.data_offset)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        values: list[npt.NDArray[Any]]
        entries, first = int(count[0]), orig_offs + 12
        if entries > MOST_ENTRIES:
            raise ValueError(f"a list of {entries} entries")
        of_numbers = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
        if of_numbers is not None:
            values = [self._get(first, of_numbers, entries)]
            stop = first + values[0].nbytes
        elif kind[0] == gguf.GGUFValueType.STRING and self.byte_order == "I":
            values, stop = self._strings(first, entries)
        elif kind[0] == gguf.GGUFValueType.ARRAY:
            raise ValueError("a list of lists")
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [gguf.GGUFValueType.ARRAY, *[gguf.GGUFValueType(kind[0])] * bool(entries)]
        return stop - orig_offs, [kind, count, *values], list(range(2, 2 + len(values))), types

    def _strings(self, at: int, entries: int) -> tuple[list[npt.NDArray[Any]], int]:
        """The bytes of so many strings, and where the last one ends. The base takes seconds for a vocabulary."""
        texts: list[npt.NDArray[Any]] = []
        for _ in range(entries):
            if not self._start <= at <= self._start + len(self._piece) - LENGTH.size:
                self._get(at, np.uint8, LENGTH.size)
            (length,) = LENGTH.unpack_from(self._piece.data, at - self._start)
            first = at + LENGTH.size
            at = first + _bounded(length)
            if at > self._start + len(self._piece):
                texts.append(self._get(first, np.uint8, length))
            else:
                texts.append(self._piece[first - self._start : at - self._start])
        return texts, at


def _bounded(length: int) -> int:
    """The length of a string. Raises ValueError if no string is as long."""
    if length > LONGEST:
        raise ValueError(f"a string of {length} bytes")
    return length


def read_parts(path: Path) -> dict[Path, Reader]:
    """The open file at `path`, and behind it the other parts if it is the first of several.

    Raises:
        InputMissing: no such file, or a part is not there.
        DataError: not a GGUF file, cut short, big-endian, not the first part, or of another set.
    """
    first = _read(path)
    count, number = _number(first, "split.count", path), _number(first, "split.no", path)
    if count <= 1:
        return {path: first}
    name = PART.fullmatch(path.name)
    if name is None or count > MOST_PARTS:
        raise DataError(
            f"{path}: one of {count} parts, whose names end in -00001-of-{count:05}.gguf and so on; give this file"
            " its own name back"
        )
    parts = [path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if number:
        raise DataError(f"{path}: part {number + 1} of {count}; name the first one, {parts[0].name}")
    for i, part in enumerate(parts):
        if not part.is_file():
            raise InputMissing(f"{part}: no such file; it is part {i + 1} of the {count} of {path.name}")
    readers = {path: first} | {part: _read(part) for part in parts[1:]}
    for i, (part, reader) in enumerate(readers.items()):
        if (_number(reader, "split.no", part), _number(reader, "split.count", part)) != (i, count):
            raise DataError(f"{part}: not part {i + 1} of the {count} of {path.name}; download it again")
    tensors = sum(len(reader.tensors) for reader in readers.values())
    if tensors != (stated := _number(first, "split.tensors.count", path)):
        raise DataError(f"{path}: its parts have {tensors} tensors, and {stated} are stated; download them again")
    seen = set[str]()
    for part, reader in readers.items():
        names = {tensor.name for tensor in reader.tensors}
        if twice := sorted(seen & names):
            raise DataError(f"{part}: another part has tensor {twice[0][:100]!r} too; download them again")
        seen |= names
    return readers


def _read(path: Path) -> Reader:
    """An open file."""
    if not path.is_file():
        raise InputMissing(f"{path}: no such file")
    try:
        reader = Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, struct.error) as error:
        if "GGMLQuantizationType" in str(error):
            raise DataError(
                f"{path}: a tensor is of a type that is not read ({error}); of bitnet.cpp's models take the"
                " safetensors folder, or a GGUF of TQ1_0 or TQ2_0"
            ) from error
        raise DataError(f"{path}: not a whole GGUF file ({error}); download it again") from error
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    if reader.endianess == gguf.GGUFEndian.BIG:
        raise DataError(
            f"{path}: a big-endian file, which flashd does not read; the gguf package turns a copy of it with"
            " gguf-convert-endian FILE little"
        )
    size = reader.file.size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise DataError(f"{path}: cut short at {size} bytes, inside {tensor.name!r}; download it again")
    return reader


def _number(reader: Reader, key: str, path: Path) -> int:
    """A whole number of the metadata, 0 if there is none. Raises DataError."""
    field = reader.get_field(key)
    value = 0 if field is None else field.contents()
    if not isinstance(value, int) or value < 0:
        raise DataError(f"{path}: {key} is {value!r}, which is not a number of parts")
    return value
