"""Reads a Hugging Face folder through the safetensors package, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from flashd.bundle import header
from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError, InputMissing
from flashd.pack.families.family import Config, Folder
from flashd.pack.families.properties import check_layers
from flashd.pack.model_file import ModelFile, packed_from, read_safetensors
from flashd.pack.open_model import ALL, OpenModel, Tensor, Which
from flashd.pack.sources import four_bits
from flashd.pack.sources.folder_config import folder_model, model_keys
from flashd.pack.sources.folder_rope import rope_divisors
from flashd.pack.sources.folder_tensors import Names, Numbers, column_order, part_of, row_order
from flashd.pack.sources.folder_tokenizer import read_tokenizer_json
from flashd.pack.sources.four_bits import FourBits, Mxfp4, StoredTensor
from flashd.pack.sources.json_file import read_object
from flashd.pack.sources.recommended import of_folder
from flashd.pack.vocabulary import Vocabulary

BITS = {"BF16": 16, "F16": 16, "F32": 32}
"""Bits a weight of the types that are read."""

ROWS_AT_ONCE = 1024


class _Stored(Tensor):
    """A tensor as its file has it, in an order of rows of its own, with `shift` added, and each row [K] multiplied by
    its `factor`."""

    def __init__(
        self, name: str, data: StoredTensor | Floats, bits: float, order: Numbers | None = None, shift: float = 0.0,
        columns: Numbers | None = None, factor: Floats | None = None,
    ) -> None:  # fmt: skip
        self.name, self.bits = name, bits
        shape = tuple(data.shape if isinstance(data, np.ndarray) else data.get_shape())
        self.shape = shape if order is None else (len(order), *shape[1:])
        self._data, self._order, self._shift, self._columns = data, order, np.float32(shift), columns
        self._factor = None if factor is None else np.broadcast_to(factor, (self.shape[0], 1))

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32 of a matrix; of a vector, all of it, [K]."""
        if len(self.shape) == 1:
            which = ALL
        numbers = np.arange(self.shape[0])[which] if self._order is None else self._order[which]
        out = np.empty((len(numbers), *self.shape[1:]), np.float32)
        for start, stop in _runs(numbers):
            first = int(numbers[start])
            out[start:stop] = self._data[first : first + stop - start]
        if self._shift:
            out += self._shift
        if self._factor is not None:
            out *= self._factor[which]
        return out if self._columns is None else out[:, self._columns]


def _runs(numbers: Numbers) -> list[tuple[int, int]]:
    """Where numbers that follow one another start and stop, ROWS_AT_ONCE at the most."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges = np.unique(np.concatenate([breaks, np.arange(0, len(numbers), ROWS_AT_ONCE), [len(numbers)]]))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


class _Packed(Tensor):
    """Ternary weights as transformers packs them (integrations/bitnet.py): four matrices of a quarter of the rows in
    one of bytes, the first in the lowest two bits, -1 as 0."""

    bits = 2.0

    def __init__(self, name: str, data: StoredTensor, scale: float) -> None:
        self.name, self._data, self._scale = name, data, np.float32(scale)
        self._quarter, width = data.get_shape()
        self.shape = (4 * self._quarter, width)

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32."""
        numbers = np.arange(self.shape[0])[which]
        out = np.empty((len(numbers), self.shape[1]), np.float32)
        for part in range(4):
            mine = np.flatnonzero(numbers // self._quarter == part)
            packed = _Stored(self.name, self._data, 8).rows(numbers[mine] % self._quarter).astype(np.uint8)
            out[mine] = ((packed >> 2 * part) & 3).astype(np.float32) - 1
        return out * self._scale


class _Master(Tensor):
    """Weights of a BitNet that is still trained: what they count for is rounded to -mean, 0 and mean."""

    def __init__(self, stored: _Stored) -> None:
        self.name, self.shape, self.bits, self._stored = stored.name, stored.shape, 2.0, stored
        self._mean: np.float32 | None = None

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32."""
        if self._mean is None:
            parts = [slice(at, at + ROWS_AT_ONCE) for at in range(0, self.shape[0], ROWS_AT_ONCE)]
            total = sum(float(np.abs(self._stored.rows(part)).sum(dtype=np.float64)) for part in parts)
            self._mean = np.float32(max(total / math.prod(self.shape), 1e-5))
        levels = np.clip(np.rint(self._stored.rows(which) / self._mean), -1, 1)
        return np.asarray(levels * self._mean, np.float32)


class _Stack(Tensor):
    """The same matrix of every expert, [E, R, K]."""

    def __init__(self, name: str, experts: Sequence[Tensor]) -> None:
        self.name, self.bits, self.mxfp4, self._experts = name, experts[0].bits, experts[0].mxfp4, experts
        self.shape = (len(experts), *experts[0].shape)

    def rows(self, which: Which = ALL) -> Floats:
        """The matrices [n, R, K] float32 of some experts."""
        return np.stack([self._experts[i].rows() for i in np.arange(len(self._experts))[which].tolist()])

    def matrix(self, number: int) -> Tensor:
        return self._experts[number]


@dataclass(frozen=True)
class _OneOf:
    """Some rows of one matrix of a stored stack [E, R, K], or if they stand `across`, [E, K, R]."""

    stack: StoredTensor
    number: int
    rows: range
    across: bool

    def get_shape(self) -> list[int]:
        return [len(self.rows), self.stack.get_shape()[1 if self.across else 2]]

    def get_dtype(self) -> str:
        return self.stack.get_dtype()

    def __getitem__(self, rows: slice | EllipsisType) -> npt.NDArray[Any]:
        mine = self.rows[slice(None) if rows is ... else rows]
        stack, span = cast(Any, self.stack), slice(mine.start, mine[-1] + 1) if mine else slice(0)
        read = np.asarray(stack[self.number, :, span]).T if self.across else np.asarray(stack[self.number, span])
        return read[:: mine.step]


@dataclass(frozen=True)
class _Biases:
    """Some of the biases [E, R] of a stack, one of each of its matrices' rows."""

    stack: StoredTensor
    rows: range

    def get_shape(self) -> list[int]:
        return [self.stack.get_shape()[0], len(self.rows)]

    def get_dtype(self) -> str:
        return self.stack.get_dtype()

    def __getitem__(self, experts: slice | EllipsisType) -> npt.NDArray[Any]:
        return np.asarray(self.stack[experts])[:, np.asarray(self.rows)]


def _rows_of(rows: int, part: int, parts: int, alternating: bool) -> range:
    """Of a stack's matrices of so many rows, which have `parts` parts, the rows of part number `part`."""
    if rows % parts:
        raise ValueError(f"a stack of matrices of {rows} rows, which are to be {parts} equal parts")
    return range(part, rows, parts) if alternating else range(part * rows // parts, (part + 1) * rows // parts)


def _matrices(
    stack: StoredTensor, part: int = 0, parts: int = 1, alternating: bool = False, across: bool = False
) -> dict[int, StoredTensor]:
    """By their numbers, part number `part` of the rows of each matrix of a stack, which has `parts` of them."""
    count, rows = stack.get_shape()[0], stack.get_shape()[2 if across else 1]
    mine = _rows_of(rows, part, parts, alternating)
    return {number: _OneOf(stack, number, mine, across) for number in range(count)}


@dataclass
class _Parts:
    """What the files of weights have of each tensor, by its GGUF name."""

    parts: dict[str, dict[int, StoredTensor]] = field(default_factory=dict)  # one, or one an expert
    four_bits: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)  # GPTQ's or AWQ's, by their ends
    mxfp4: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)  # stacks, by their ends
    rows: dict[str, range] = field(default_factory=dict)  # of those stacks, the rows of each matrix
    scales: dict[str, float] = field(default_factory=dict)  # BitNet's

    def add(self, stored: str, part: StoredTensor, names: Names) -> None:
        """Takes the tensor that its file calls `stored`, unless it is no weight."""
        if stored.endswith(".weight_scale") and (found := names.find(stored.removesuffix("_scale"))):
            self.scales[found[0]] = float(np.asarray(part[...], np.float32).reshape(-1)[0])
            return
        end = next((end for end in four_bits.PARTS if stored.endswith(end)), None)
        if end and (found := names.find(f"{stored.removesuffix(end)}.weight")):
            self.four_bits.setdefault(found[0], {})[end] = part
        elif split := names.split(stored):
            self.parts |= {name: {0: part} for name in split}
        elif joined := names.joined(stored):
            self._add_stack(stored, part, joined, names.folder)
        elif (found := names.find(stored)) and "_exps." in found[0] and len(part.get_shape()) == 3:
            self.parts[found[0]] = _matrices(part)
        elif found:
            self.parts.setdefault(found[0], {})[found[1] or 0] = part

    def _add_stack(self, stored: str, part: StoredTensor, joined: list[str], folder: Folder) -> None:
        """Takes a stack, or a part of it, that holds those that GGUF calls `joined`."""
        end = next((end for end in four_bits.MXFP4_PARTS if stored.endswith(end)), None)
        for i, name in enumerate(joined):
            if end:
                self.mxfp4.setdefault(name, {})[end] = part
                self.rows[name] = _rows_of(part.get_shape()[1], i, len(joined), folder.alternating)
            elif name.endswith(".bias"):
                mine = _rows_of(part.get_shape()[1], i, len(joined), folder.alternating)
                self.parts[name] = {0: _Biases(part, mine)}
            else:
                self.parts[name] = _matrices(part, i, len(joined), folder.alternating, folder.across)


def _find_parts(files: list[ModelFile], names: Names) -> _Parts:
    """What the files hold, none of it read yet. Raises DataError."""
    out, seen = _Parts(), set[str]()
    for file in files:
        for stored, part in read_safetensors(file).items():
            if stored in seen:
                raise DataError(
                    f"{file.path}: another file has tensor {stored[:100]!r} too; download the folder again"
                )
            seen.add(stored)
            out.add(stored, part, names)
    return out


class HfFolder(OpenModel):
    """An open Hugging Face folder.

    Raises:
        InputMissing: a file that it needs is not there.
        DataError: a file is damaged, cut short or of a kind that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise InputMissing(f"{path}: no config.json in it; a model is a GGUF file or a Hugging Face folder")
        stated = read_object(path / "config.json")
        self._rounded = _rounded(path, stated)
        try:
            self._model = folder_model(stated, path)
            check_layers(int(self._model.config.get("num_hidden_layers", 1)), path / "config.json")
            keys = model_keys(self._model)
            self._made = rope_divisors(self._model.config, self._model.head_dim)
            self._files = [ModelFile(file) for file in _weight_files(path)]
            names = Names(self._model)
            self._stored = _find_parts(self._files, names)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise DataError(f"{path / 'config.json'}: makes no sense: {error!r}") from error
        self._left_out = names.left_out
        self.architecture = self._model.architecture
        self._metadata = {f"{self.architecture}.{key}": value for key, value in keys.items()}
        self._metadata |= {"general.architecture": self.architecture, "general.name": path.resolve().name}

    @property
    def names(self) -> set[str]:
        return {*self._stored.parts, *self._stored.four_bits, *self._stored.mxfp4, *self._made}

    @property
    def left_out(self) -> set[str]:
        """What the folder also has and a bundle has not, in words."""
        return self._left_out

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`. Raises DataError."""
        if name in self._made:
            return _Stored(name, self._made[name], bits=32)
        if name in self._stored.four_bits:
            rows = self._stored.four_bits[name][".scales"].get_shape()[1]
            order, columns = row_order(self._model, name, rows), column_order(self._model, name, rows)
            if columns is not None:
                raise DataError(f"{self.path}: tensor {name!r} has 4 bits and columns in another order; take a GGUF")
            return FourBits(name, self._stored.four_bits[name], self._rounded, order)
        if name in self._stored.mxfp4:
            halves, mine = self._stored.mxfp4[name], self._stored.rows[name]
            experts = next(iter(halves.values())).get_shape()[0]
            return self._stack(name, [Mxfp4(name, halves, number, mine) for number in range(experts)])
        if name not in self._stored.parts:
            raise DataError(f"{self.path}: tensor {name!r} is missing")
        found = [self._matrix(name, part) for _, part in sorted(self._stored.parts[name].items())]
        return self._stack(name, found) if name.endswith("_exps.weight") else found[0]

    def _stack(self, name: str, experts: Sequence[Tensor]) -> Tensor:
        """The matrices of all experts. Raises DataError if they are not all there, or differ."""
        if len(experts) != self.number("expert_count", int) or len({part.shape for part in experts}) != 1:
            raise DataError(f"{self.path}: tensor {name!r} is not there for every expert alike")
        return _Stack(name, experts)

    def _matrix(self, name: str, part: StoredTensor) -> Tensor:
        """A tensor, or one expert's."""
        kind, rows = part.get_dtype(), part.get_shape()[0]
        if kind == "U8" and name in self._stored.scales:
            scale, divides = self._stored.scales[name], self._rounded.get("linear_class", "bitlinear") == "bitlinear"
            return _Packed(name, part, 1 / scale if divides else scale)
        if kind not in BITS:
            known = ", ".join(BITS)
            raise DataError(f"{self.path}: tensor {name!r} is of type {kind}, which is not read; known are {known}")
        folder, order = self._model.folder, row_order(self._model, name, rows)
        if change := folder.changed.get(part_of(name)):
            changed = change(_Stored(name, part, BITS[kind], order).rows())
            return _Stored(name, changed, BITS[kind])
        shifted = name.endswith("norm.weight") and part_of(name) not in folder.unshifted
        columns = column_order(self._model, name, part.get_shape()[-1])
        factor = folder.weighed(self._model.config, part_of(name))
        if factor is not None and len(factor) not in (1, rows):
            raise DataError(f"tensor {name!r} has {rows} rows and should have {len(factor)}")
        tensor = _Stored(name, part, BITS[kind], order, folder.shift if shifted else 0.0, columns, factor)
        online = self._rounded.get("quantization_mode") == "online"
        return _Master(tensor) if online and name.startswith("blk.") and len(tensor.shape) == 2 else tensor

    @property
    def keys(self) -> set[str]:
        """Of all metadata."""
        return set(self._metadata)

    @property
    def unknown(self) -> Sequence[str]:
        """What config.json says that changes answers and that flashd does not know, in words."""
        return self._model.unknown

    def metadata(self, key: str) -> Any:
        """A value of the metadata, None where there is none."""
        return self._metadata.get(key)

    def vocabulary(self) -> Vocabulary:
        """The tokenizer. Raises InputMissing, DataError."""
        return read_tokenizer_json(self.path, self.tensor("token_embd.weight").shape[0])

    def recommended(self) -> header.Drawing | None:
        """How the model's makers recommend that answers are drawn. Raises DataError if that makes no sense."""
        return of_folder(self.path)

    def source(self, on_progress: Callable[[int], None] = lambda nbytes: None) -> header.PackedFrom:
        """The folder's name, and the size and SHA-256 of its files of weights, one after the other."""
        return packed_from(self.path.resolve().name, self._files, on_progress)


def _rounded(path: Path, config: Config) -> Config:
    """How the weights were rounded; empty where they were not. Raises DataError for a way that is not read."""
    stated = config.get("quantization_config")
    if not stated:
        return {}
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if isinstance(stated, dict) and method in ("gptq", "awq"):
        four_bits.check_method(path, stated)
        return stated
    if isinstance(stated, dict) and method in ("bitnet", "mxfp4"):
        return stated
    raise DataError(
        f"{path}: weights quantised by {method!r} are not read (awq, bitnet, gptq and mxfp4 are); take the model's"
        " folder from before, or a GGUF"
    )


def _weight_files(path: Path) -> list[Path]:
    """The files of weights, in the order of their names."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = {str(name) for name in read_object(index)["weight_map"].values()}
        if odd := sorted(name for name in names if "/" in name or name in ("", ".", "..")):
            raise DataError(f"{index}: {odd[0][:100]!r} is not the name of a file beside it")
        files = [path / name for name in sorted(names)]
    else:
        files = [path / "model.safetensors"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputMissing(f"{missing[0]}: no such file; weights are read from model.safetensors, or from its shards")
    return files
