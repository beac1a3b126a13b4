"""Weights that GPTQ, AWQ or MXFP4 has rounded to 4 bits, as their safetensors folders keep them.

GPTQ and AWQ keep a matrix [N, K] transposed and in parts: levels q and, for each group of weights of a row, a zero z
and a scale s; a weight is s * (q - z). Eight levels or zeros lie in an int32, the first in its lowest bits:

    GPTQ   qweight [K / 8, N] along K, qzeros [G, N / 8], each less 1 but in `gptq_v2`; g_idx [K] has weights' groups
    AWQ    qweight [K, N / 8] along N, qzeros [G, N / 8], of each eight first the even ones, then the odd ones

and scales [G, N]. (AutoGPTQ's qlinear_cuda.py, AutoAWQ's utils/packing_utils.py.)

gpt-oss keeps stacks of matrices [E, R, K] as MXFP4: blocks [E, R, K / 32, 16], two weights a byte, the first in the
low bits, and scales [E, R, K / 32] (transformers, integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.bits import unpack
from flashd.bundle.rows.kinds import BLOCK, Bytes, Floats
from flashd.bundle.rows.mxfp4 import widened
from flashd.errors import DataError
from flashd.pack.open_model import ALL, Grid, Tensor, Which

Numbers = npt.NDArray[np.int64]

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Ends of the names of what takes the place of a `.weight`."""

MXFP4_PARTS = ("_blocks", "_scales")
"""Ends of the names of the parts of a stack of MXFP4."""

AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def check_method(path: Path, stated: Mapping[str, Any]) -> None:
    """Raises DataError for a way of rounding that is not read."""
    method, bits = stated.get("quant_method"), stated.get("bits", stated.get("w_bit"))
    if bits != 4 or (method == "awq" and stated.get("version", "gemm") != "gemm"):
        kind = f"{bits} bits" + (f" and version {stated.get('version')!r}" if method == "awq" else "")
        raise DataError(
            f"{path}: weights of {method} with {kind} are not read; of its kinds only 4 bits (AWQ: gemm) are"
        )


class StoredTensor(Protocol):
    """A tensor of a safetensors file; a slice of it is read when it is cut."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, rows: slice | EllipsisType) -> npt.NDArray[Any]: ...


class FourBits(Tensor):
    """A matrix of such parts, in an order of rows of its own. Raises DataError where they do not fit together."""

    def __init__(
        self, name: str, parts: Mapping[str, StoredTensor], stated: Mapping[str, Any], order: Numbers | None
    ) -> None:
        missing = [part for part in PARTS[:3] if part not in parts]
        if missing:
            raise DataError(f"tensor {name!r} has no part {missing[0]!r}")
        self.name, self.bits = name, 4.5
        self._parts, self._order, self._awq = parts, order, stated["quant_method"] == "awq"
        # the files of the first version have zeros less 1
        self._less = 0 if self._awq or stated.get("checkpoint_format") == "gptq_v2" else 1
        packed = parts[".qweight"].get_shape()
        groups, rows = parts[".scales"].get_shape()
        self.shape = (rows, packed[0] if self._awq else 8 * packed[0])
        self._size = self.shape[1] // groups
        self._levels: Bytes | None = None
        stated_shape = (self.shape[1], rows // 8) if self._awq else (self.shape[1] // 8, rows)
        if tuple(packed) != stated_shape or parts[".qzeros"].get_shape() != [groups, rows // 8] or rows % 8:
            raise DataError(f"tensor {name!r} has parts that do not fit together")

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32."""
        numbers, group = self._numbers(which), self._groups()
        if self._levels is None:
            self._levels = self._unpacked()
        scale, zero = self._steps(numbers)
        return np.asarray((self._levels[numbers] - zero[:, group]) * scale[:, group], np.float32)

    def grid(self, which: Which = ALL) -> Grid | None:
        """The grid of some rows, where no block of 32 has weights of two groups."""
        group = self._groups()
        if self.shape[1] % BLOCK or (group.reshape(-1, BLOCK) != group[::BLOCK, None]).any():
            return None
        scale, zero = (part[:, group[::BLOCK]] for part in self._steps(self._numbers(which)))
        return np.abs(scale), scale * (8 - zero)

    def _numbers(self, which: Which) -> Numbers:
        order = np.arange(self.shape[0]) if self._order is None else self._order
        return np.asarray(order[which])

    def _groups(self) -> Numbers:
        """[K] each weight's group."""
        if ".g_idx" in self._parts:
            return np.asarray(self._parts[".g_idx"][:], np.int64)
        return np.asarray(np.arange(self.shape[1]) // self._size, np.int64)

    def _steps(self, numbers: Numbers) -> tuple[Floats, Floats]:
        """(scales, zeros) of some rows, each [n, G]."""
        zero = self._along_rows(self._parts[".qzeros"][:]) + np.float32(self._less)
        scale = self._parts[".scales"][:].astype(np.float32)
        return scale.T[numbers], zero.T[numbers]

    def _unpacked(self) -> Bytes:
        """[N, K] every level."""
        packed = self._parts[".qweight"][:]
        if self._awq:
            return np.ascontiguousarray(self._along_rows(packed).T)
        return np.ascontiguousarray(_nibbles(packed.T).reshape(self.shape))

    def _along_rows(self, packed: npt.NDArray[np.int32]) -> Bytes:
        """Packed [X, N / 8] -> [X, N]."""
        nibbles = _nibbles(packed)
        return (nibbles[..., np.argsort(AWQ_ORDER)] if self._awq else nibbles).reshape(len(packed), -1)


class Mxfp4(Tensor):
    """Some rows [R, K] of one matrix of a stack of MXFP4. Raises DataError if its parts do not fit together."""

    bits, mxfp4 = 4.25, True

    def __init__(self, name: str, parts: Mapping[str, StoredTensor], number: int, rows: range) -> None:
        self.name, self._number, self._rows = name, number, rows
        if set(parts) != set(MXFP4_PARTS):
            raise DataError(f"tensor {name!r} has not both parts, {' and '.join(MXFP4_PARTS)}")
        self._blocks, self._scales = (parts[end] for end in MXFP4_PARTS)
        shape, scales = self._blocks.get_shape(), self._scales.get_shape()
        if len(shape) != 4 or shape[:3] != scales or shape[3] != BLOCK // 2:
            raise DataError(f"tensor {name!r} has parts that do not fit together")
        self.shape = (len(rows), BLOCK * shape[2])

    def rows(self, which: Which = ALL) -> Floats:
        """Rows [n, K] float32."""
        numbers = np.asarray(self._rows)[which]
        if not len(numbers):
            return np.zeros((0, self.shape[1]), np.float32)
        first, stop = int(numbers.min()), int(numbers.max()) + 1
        stored: Any = (self._blocks, self._scales)
        blocks, scales = (np.asarray(part[self._number, first:stop], np.uint8)[numbers - first] for part in stored)
        return widened(unpack(blocks.reshape(len(numbers), -1), 4), scales)


def _nibbles(packed: npt.NDArray[np.int32]) -> Bytes:
    """[...] -> [..., 8], the lowest first."""
    return np.asarray(packed[..., None] >> np.arange(0, 32, 4, dtype=np.int32) & 15, np.uint8)
