"""Packs integers of 1, 2, 3, 4 and 8 bits into bytes and unpacks them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import Bytes, Codes


def pack_bits(q: Bytes, bits: int) -> Bytes:
    """Integers [..., K] uint8 -> packed bytes [..., K * bits / 8]. The first integer of a byte is in its low bits.

    Integers of 3 bits are two parts, one behind the other: their lower two bits, then their upper bits.
    """
    if bits == 3:
        lower, upper = np.bitwise_and(q, 3, dtype=np.uint8), np.right_shift(q, 2, dtype=np.uint8)
        return np.concatenate([pack_bits(lower, 2), pack_bits(upper, 1)], axis=-1)
    step = 8 // bits
    packed = q[..., 0::step]
    for i in range(1, step):
        packed = np.bitwise_or(packed, q[..., i::step] << (i * bits), dtype=np.uint8)
    return packed


def unpack(q: Bytes, bits: int) -> Bytes:
    """Packed integers [..., K * bits / 8] -> integers [..., K] uint8."""
    if bits == 8:
        return q
    if bits == 3:
        lower = q.shape[-1] * 2 // 3
        upper = np.left_shift(unpack(q[..., lower:], 1), 2, dtype=np.uint8)
        return np.asarray(unpack(q[..., :lower], 2) | upper, np.uint8)
    step, most = 8 // bits, (1 << bits) - 1
    out = np.empty((*q.shape[:-1], q.shape[-1] * step), np.uint8)
    for i in range(step):
        np.bitwise_and(q >> (i * bits), most, out=out[..., i::step])
    return out


def as_nibbles(q: Bytes, bits: int) -> Bytes:
    """Packed integers of 3 or 2 bits [..., K * bits / 8] as nibbles [..., K / 2] that stand for as much."""
    lower = q.shape[-1] * 2 // bits
    out = _nibbles(2, bits)[q[..., :lower]]  # [..., K / 4] uint16
    if bits == 3:
        upper = out.view("<u4")
        upper += _nibbles(1, bits)[q[..., lower:]]  # [..., K / 8] uint32; no nibble overflows: the largest is 11
    return out.view(np.uint8)


def centre_digits(codes: Codes, width: int, bits: int) -> Bytes:
    """Codes of centres [n, B] in two digits of `bits` bits each, [n, 2 * width] uint8: all high ones, then the low.

    Digits lie around zero, which is the middle of their range; the width is filled up with zeros.
    """
    half = 1 << (bits - 1)
    low = (codes.astype(np.int32) + half) % (2 * half) - half
    high = (codes - low) >> bits
    digits = np.zeros((len(codes), 2, width), np.int32)
    digits[:, 0, : codes.shape[1]], digits[:, 1, : codes.shape[1]] = high, low
    return (digits + half).astype(np.uint8).reshape(len(codes), -1)


@cache
def _nibbles(part: int, bits: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """[256]: for each byte the nibbles of its weights. The byte holds the lower two bits of each (`part` 2) or the
    upper one (`part` 1)."""
    values = unpack(np.arange(256, dtype=np.uint8)[:, None], part).astype(np.uint32)  # [256, weights]
    values = values * np.uint32(4) if part == 1 else values + np.uint32(8 - (1 << (bits - 1)))
    words = pack_bits(values.astype(np.uint8), 4)
    return words.view("<u2" if part == 2 else "<u4").reshape(256)
