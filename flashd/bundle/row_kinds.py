"""The kinds of rows, their bits and codes, and the types of the arrays that hold them."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BLOCK = 32
"""How many weights share a scale and a centre, and how many neurons are a group."""


RowKind = Literal["int4", "int8", "f16", "ternary", "int3", "int2"]
ROW_KINDS: tuple[RowKind, ...] = ("int4", "int8", "f16")
"""The kinds that a user may ask for. Weights that are ternary stay ternary, unless f16 is asked for."""

NARROW: tuple[RowKind, ...] = ("int3", "int2")
"""The kinds of groups that matter little, in a bundle of int4 rows. When they are read they are widened to int4."""

BITS: dict[RowKind, int] = {"int4": 4, "int8": 8, "f16": 16, "ternary": 2, "int3": 3, "int2": 2}
"""Bits of a weight."""

CODE_TYPES: dict[RowKind, tuple[type[np.unsignedinteger[Any]], type[np.signedinteger[Any]]]] = {
    "int4": (np.uint8, np.int8),
    "int8": (np.uint16, np.int16),
    "int3": (np.uint8, np.int8),
    "int2": (np.uint8, np.int8),
}
"""The types of scale codes and of centre codes. The largest code of a type stands for the row's step of that kind."""

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]


@cache
def unit_steps(kind: RowKind) -> Floats:
    """[2] float32: the value of one scale code and of one centre code, in parts of the row's step."""
    return np.array([1 / np.iinfo(code).max for code in CODE_TYPES[kind]], np.float32)
