"""How a key or a value of one head is kept: as it is, or in 8 bits.

In 8 bits a row of D numbers is D codes from -127 to 127, then a scale for each block of them, the upper half of a
float32. The graph of attention rounds keys and values to what such a row holds before it uses them (graphs.rounding).
So attention sees the same numbers in the pass that makes them and in every later one, and a row that is kept and read
again is the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import Floats
from flashd.graphs.rounding import SMALLEST, KvFormat, block

Kept = npt.NDArray[np.float32] | npt.NDArray[np.uint8]

SCALE_BYTES = 2
MOST = 127
"""The largest code."""


def row_bytes(form: KvFormat, head_dim: int) -> int:
    return 4 * head_dim if form == "float32" else head_dim + head_dim // block(head_dim) * SCALE_BYTES


def empty(form: KvFormat, heads: int, rows: int, head_dim: int, kept: int = 2) -> Kept:
    """Memory of zeros for a layer's keys and its values: [2, heads, rows, head dim], or bytes in place of numbers.

    If one row stands for both, `kept` is 1, and there is one of these.
    """
    if form == "float32":
        return np.zeros((kept, heads, rows, head_dim), np.float32)
    return np.zeros((kept, heads, rows, row_bytes(form, head_dim)), np.uint8)


def read(rows: Kept, out: Floats) -> None:
    """Rows in 8 bits [..., bytes] -> out [..., D]."""
    codes = rows[..., : out.shape[-1]].view(np.int8)
    scales = rows[..., out.shape[-1] :].view("<u2").astype(np.uint32) << 16  # [..., blocks]
    np.copyto(out, codes)  # in two steps, which is faster than in one
    wide = _blocks(out)
    np.multiply(wide, scales.view(np.float32)[..., None], out=wide)


def write(values: Floats, rows: Kept) -> None:
    """values [..., D], which graphs.rounding has rounded -> rows in 8 bits [..., bytes]."""
    wide = _blocks(values)
    scales = np.abs(wide).max(-1) / np.float32(MOST)  # exact: the largest code is MOST
    codes = np.rint(wide / np.maximum(scales, SMALLEST)[..., None]).astype(np.int8)
    rows[..., : values.shape[-1]] = codes.reshape(values.shape).view(np.uint8)
    rows[..., values.shape[-1] :] = (scales.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def _blocks(values: Floats) -> Floats:
    """[..., D] -> [..., blocks, numbers of a block], the same memory."""
    head_dim, numbers = values.shape[-1], block(values.shape[-1])
    return values.reshape(*values.shape[:-1], head_dim // numbers, numbers)
