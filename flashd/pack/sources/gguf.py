"""Reads a GGUF model through the gguf package, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle import header
from flashd.bundle.rows.kinds import BLOCK, Bytes, Floats
from flashd.errors import DataError
from flashd.pack.model_file import packed_from
from flashd.pack.open_model import ALL, Grid, OpenModel, Tensor, Which
from flashd.pack.sources.gguf_parts import read_parts
from flashd.pack.sources.gguf_tokenizer import read_vocabulary
from flashd.pack.sources.recommended import of_gguf
from flashd.pack.vocabulary import Vocabulary


class GgufTensor(Tensor):
    """One matrix or vector of a model file, rows K wide, dequantised when asked for."""

    def __init__(self, tensor: gguf.ReaderTensor, number: int | None = None) -> None:
        """`number`: of the one matrix of a stack that this is."""
        self._tensor = tensor
        self.name = tensor.name
        self.kind: Kind = tensor.tensor_type
        self.mxfp4 = self.kind == Kind.MXFP4
        data = cast(Any, tensor.data)  # a FilePart
        self._data = data if number is None else data.matrix(number)
        self.shape = tuple(int(n) for n in reversed(tensor.shape))
        block, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        self.bits = 8 * nbytes / block
        if number is not None:
            self.shape = self.shape[1:]

    def matrix(self, number: int) -> GgufTensor:
        """One matrix [R, K] of a stack [n, R, K]."""
        return GgufTensor(self._tensor, number)

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32 of a matrix, or matrices [n, R, K] of a stack; of a vector, all of it, [K].

        Raises DataError where the gguf package cannot dequantise this type.
        """
        part = self._data[ALL if len(self.shape) == 1 else which]
        try:
            values = gguf.dequantize(_longer(part), self.kind).reshape(*part.shape[:-1], self.shape[-1])
        except NotImplementedError as error:
            raise DataError(f"tensor {self.name!r} is of type {self.kind.name}, which is not read") from error
        return np.ascontiguousarray(values, np.float32)

    def grid(self, which: Which = ALL) -> Grid | None:
        """The grid of some rows, or None for a source that has none of blocks of 32.

        Field order and meaning: ggml's block_q4_0, block_q4_1, block_q4_K and block_q8_0.
        """
        if len(self.shape) != 2 or self.shape[1] % BLOCK:
            return None
        raw = self._data[which]
        if self.kind in (Kind.Q4_0, Kind.Q8_0):
            block_bytes = gguf.GGML_QUANT_SIZES[self.kind][1]
            scale = _halves(raw.reshape(len(raw), -1, block_bytes)[:, :, :2])[..., 0]
            # Q4_0's scale may be negative, which turns the grid over: 8 steps up then and 7 down
            return np.abs(scale), np.maximum(-scale, 0)
        if self.kind == Kind.Q4_1:
            head = _halves(raw.reshape(len(raw), -1, 20)[:, :, :4])
            return head[..., 0], head[..., 1] + 8 * head[..., 0]
        if self.kind == Kind.Q4_K:
            blocks = raw.reshape(-1, 144)
            steps = _halves(blocks[:, :4])
            scale, least = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])
            scale = scale.reshape(-1, 8) * steps[:, :1]
            least = least.reshape(-1, 8) * -steps[:, 1:]
            return scale.reshape(len(raw), -1), (least + 8 * scale).reshape(len(raw), -1)
        return None


ROWS_IN_ONE = 8
"""Rows that the gguf package is given as one. It converts 16 at a time, which are few weights if rows are short."""


def _longer(part: Bytes) -> Bytes:
    """The same blocks in longer and fewer rows."""
    together = math.gcd(math.prod(part.shape[:-1]), ROWS_IN_ONE)
    return part.reshape(-1, together * part.shape[-1])


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


LONG_LISTS = tuple(f"tokenizer.ggml.{part}" for part in ("tokens", "merges", "scores", "token_type"))


class GgufModel(OpenModel):
    """An open GGUF file, or the first of its parts with all others. Raises what `read_parts` does."""

    def __init__(self, path: Path, pre: str | None = None) -> None:
        """`pre`: the pre-tokenizer, whatever the file says."""
        self.path = path
        self._parts, self._pre = read_parts(path), pre
        self.reader = self._parts[path]
        # Falcon-H1's files have the norms in front of FFNs without an end
        ends = {".ffn_norm": ".weight"}
        self._tensors = {
            t.name + next((end for name, end in ends.items() if t.name.endswith(name)), ""): t
            for reader in self._parts.values()
            for t in reader.tensors
        }
        self.architecture = self.text("general.architecture")

    @property
    def keys(self) -> set[str]:
        """Of all metadata."""
        return set(self.reader.fields)

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> GgufTensor:
        """The tensor called `name`. Raises DataError."""
        try:
            return GgufTensor(self._tensors[name])
        except KeyError:
            raise DataError(f"{self.path}: tensor {name!r} is missing") from None

    def metadata(self, key: str) -> Any:
        """A value of the metadata, None where there is none. Raises DataError where it is damaged."""
        field = self.reader.get_field(key)
        if field is None:
            return None
        try:
            return field.contents()
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: {key!r} is damaged: {error}") from error

    def vocabulary(self) -> Vocabulary:
        """The tokenizer, which can be had once. Raises DataError where it is of an unknown kind or incomplete."""
        vocabulary = read_vocabulary(self, self.tensor("token_embd.weight").shape[0], self._pre)
        for key in LONG_LISTS:
            # an array of its own for each string: with 151,000 tokens some 40 MiB
            self.reader.fields.pop(key, None)
        return vocabulary

    def recommended(self) -> header.Drawing | None:
        """How the model's makers recommend that answers are drawn. Raises DataError if that makes no sense."""
        return of_gguf(self.keys, self.metadata, self.path)

    def source(self, on_progress: Callable[[int], None] = lambda nbytes: None) -> header.PackedFrom:
        """Name, size and SHA-256 of the file, or of its parts one after the other."""
        return packed_from(self.path.name, (each.file for each in self._parts.values()), on_progress)
