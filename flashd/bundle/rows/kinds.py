"""The kinds of rows, their bits and codes, and the types of arrays that hold them."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BLOCK = 32
"""Weights that share a scale and a centre."""

RowKind = Literal["int4", "int8", "f16", "ternary", "mxfp4", "int3", "int2"]
ROW_KINDS: tuple[RowKind, ...] = ("int4", "int8", "f16")
"""What may be asked for. Weights that are ternary, and experts that are MXFP4, stay so where few bits are wanted."""

NARROW: tuple[RowKind, ...] = ("int3", "int2")
"""What the card has of groups that matter little in a bundle of int4 rows.

Those of a plain model are int4 as soon as they are read. Experts stay as they are.
"""

BITS: dict[RowKind, int] = {"int4": 4, "int8": 8, "f16": 16, "ternary": 2, "mxfp4": 4, "int3": 3, "int2": 2}

CODE_TYPES: dict[RowKind, type[np.unsignedinteger[Any]]] = {
    "int4": np.uint8, "int8": np.uint16, "int3": np.uint8, "int2": np.uint8,
}  # fmt: skip
"""The types of scale codes; the largest of each type stands for the largest scale of a row."""

CENTRE_BITS: dict[RowKind, int] = {"int4": 4, "int8": 8, "int3": 4, "int2": 4}
"""Bits of each of the two digits that a centre has."""

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]


def largest_centre(kind: RowKind) -> int:
    """The largest code of a centre: one whose digits, in -8 .. 7 or -128 .. 127, are both the largest."""
    radix = 1 << CENTRE_BITS[kind]
    return (radix // 2 - 1) * (radix + 1)


@cache
def unit_steps(kind: RowKind) -> Floats:
    """[2] float32: what one code of scale and of centre is worth, in parts of the largest."""
    return np.array([1 / np.iinfo(CODE_TYPES[kind]).max, 1 / largest_centre(kind)], np.float32)
