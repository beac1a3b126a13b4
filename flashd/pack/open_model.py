"""What a model to be packed looks like, whatever it is kept in.

The names of tensors, the keys of hyper-parameters and the order of rows are those of GGUF files, as llama.cpp
writes them: another kind of source turns its own into these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from flashd.bundle import header
from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.vocabulary import Vocabulary

GUESSING = "what guesses further tokens (MTP)"
"""Layers behind a model's last, that a bundle has not."""

Number = TypeVar("Number", int, float)

Which = slice | npt.NDArray[np.int64]
"""Rows of a tensor: a slice, or their numbers."""

ALL = slice(None)

Grid = tuple[Floats, Floats]
"""(scale, centre), each [n, K / 32]: the very steps that the source was rounded to."""


class Tensor(Protocol):
    """One matrix or vector of a model, rows K wide, read when asked for."""

    name: str
    shape: tuple[int, ...]
    bits: float  # a weight, in the source
    mxfp4: bool = False  # whether its rows are blocks of 32 weights of MXFP4

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32 of a matrix, or matrices [n, R, K] of a stack; of a vector, all of it, [K].

        Raises DataError for a type of weights that is not read.
        """

    def matrix(self, number: int) -> Tensor:
        """One matrix [R, K] of a stack [n, R, K]. Raises DataError where this is none."""
        raise DataError(f"tensor {self.name!r} is no stack of matrices, of which number {number} is wanted")

    def grid(self, which: Which = ALL) -> Grid | None:  # noqa: ARG002
        """The grid of some rows, or None for a source that has none of blocks of 32, as here."""
        return None


class OpenModel(Protocol):
    """An open model."""

    path: Path
    architecture: str

    @property
    def names(self) -> set[str]:
        """Of all tensors. Those that GGUF has no name for keep their own."""

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`. Raises DataError."""

    def metadata(self, key: str) -> Any:
        """A value of the metadata, None where there is none. Raises DataError where it is damaged."""

    def vocabulary(self) -> Vocabulary:
        """The tokenizer. Raises DataError where it is of an unknown kind or incomplete."""

    def source(self, on_progress: Callable[[int], None] = lambda nbytes: None) -> header.PackedFrom:
        """Name, size and SHA-256 of what the model is kept in."""

    def recommended(self) -> header.Drawing | None:
        """How the model's makers recommend that answers are drawn. Raises DataError if that makes no sense."""
        return None

    @property
    def keys(self) -> set[str]:
        """Of all metadata."""

    @property
    def unknown(self) -> Sequence[str]:
        """What it says of itself, beside `keys`, that changes answers and that flashd does not know, in words."""
        return ()

    @property
    def layers(self) -> int:
        """Those of the model, without those behind them that guess further tokens. Raises DataError."""
        return self.number("block_count", int) - self.number("nextn_predict_layers", int, 0)

    @property
    def left_out(self) -> set[str]:
        """What the model also has and a bundle has not, in words."""
        return {GUESSING} if self.number("nextn_predict_layers", int, 0) else set()

    def has(self, key: str) -> bool:
        return self.metadata(key) is not None

    def text(self, key: str) -> str:
        """A text of the metadata. Raises DataError where it is missing or no text."""
        value = self.metadata(key)
        if not isinstance(value, str):
            raise DataError(f"{self.path}: {key!r} is missing or no text")
        return value

    def number(self, key: str, kind: type[Number], default: Number | None = None) -> Number:
        """A number of the architecture's metadata. Raises DataError where it is missing or no number."""
        value = _of_every_layer(self.metadata(f"{self.architecture}.{key}"))
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise DataError(
                f"{self.path}: '{self.architecture}.{key}' differs from layer to layer, which is not supported"
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise DataError(f"{self.path}: '{self.architecture}.{key}' is missing or no number")
        try:
            return kind(value)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.path}: '{self.architecture}.{key}' is {value}, which is not a number") from error


def _of_every_layer(value: Any) -> Any:
    """A list of one number a layer stands for that number if all are alike."""
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value
