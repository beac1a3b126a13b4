"""Opens a GGUF file, or all parts of one that is split, through the gguf package."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from flashd.errors import DataError, InputMissing

MOST_ENTRIES = 1 << 21
"""Of a list in a model's metadata. The longest there are, of merges, have some hundred thousand."""

MOST_PARTS = 1000

PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
"""The name of a part, as llama.cpp's gguf-split gives it."""


class Reader(gguf.GGUFReader):
    """Its arrays, two for each token and merge, are plain ones: as views of a numpy.memmap they take 400 MB more.

    Its base takes numbers behind the end of the file for nothing, as many as a list says. Raises ValueError there.
    """

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, value: np.memmap[Any, Any]) -> None:
        self._data = value.view(np.ndarray)

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"cut short at {len(self.data)} bytes")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            entries = int(self._get(orig_offs + 4, np.uint64)[0])
            if entries > MOST_ENTRIES:
                raise ValueError(f"a list of {entries} entries")
        return super()._get_field_parts(orig_offs, raw_type)


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
    size = path.stat().st_size
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
