"""MXFP4: blocks of 32 weights that share a power of two (OCP Microscaling Formats, version 1.0).

A weight has 4 bits: a sign, then one of eight sizes that lie closer together around zero. No whole steps are as many
as 16, so rows that count steps would lose some. As soon as they are read they are rows of 8 bits, which lose nothing.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from flashd.bundle.rows.bits import unpack
from flashd.bundle.rows.kinds import BLOCK, Bytes, Floats

SIZES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the size that each of the lower three bits stands for; the upper bit is the sign."""

BIAS, MISSING = 128, 255
"""The exponent that stands for half of 1, and the one that is not a number."""

_TWICE = np.array([*SIZES, *(-size for size in SIZES)], np.int16)
_BYTES = np.ascontiguousarray((_TWICE[unpack(np.arange(256, dtype=np.uint8)[:, None], 4)] + 128).astype(np.uint8))
_PAIRS = _BYTES.view(np.uint16).reshape(256)  # of each byte, its two weights as bytes
BYTES = np.ascontiguousarray(_BYTES.T)
"""[2, 256]: of each byte, the first and the second of its weights, as `as_bytes` has them."""


def widened(codes: Bytes, exponents: Bytes) -> Floats:
    """Codes [n, K] and the exponents of their blocks [n, K / 32] -> [n, K] float32."""
    blocks = _TWICE[codes].astype(np.float32).reshape(*exponents.shape, BLOCK)
    return np.asarray((blocks * scales(exponents)[..., None]).reshape(codes.shape), np.float32)


def scales(exponents: Bytes) -> Floats:
    """What half of 1 is worth in each block, float32. NaN for an exponent that is not a number."""
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS)
    return np.where(exponents == MISSING, np.float32(np.nan), powers)


def as_bytes(q: Bytes) -> Bytes:
    """Packed codes [..., K / 2] as bytes [..., K]: 128 and twice the weight, as rows of 8 bits have it."""
    return _PAIRS[q].view(np.uint8)


def coded(weights: Floats) -> tuple[Bytes, Bytes]:
    """(codes [n, K], exponents [n, K / 32]) of rows [n, K], the nearest. Rows that were MXFP4 keep every weight."""
    blocks = weights.reshape(len(weights), -1, BLOCK)
    most = np.abs(blocks).max(2)  # [n, K / 32]
    # 4 or 6, the largest sizes, have the second bit behind the point of their power of two
    exponents = np.where(most > 0, np.frexp(most)[1] - 4 + BIAS, BIAS).clip(0, MISSING - 1).astype(np.uint8)
    twice = blocks / scales(exponents)[..., None]
    between = np.array([(a + b) / 2 for a, b in pairwise(SIZES)], np.float32)
    codes = np.searchsorted(between, np.abs(twice)) + 8 * (twice < 0)
    return codes.astype(np.uint8).reshape(weights.shape), exponents
