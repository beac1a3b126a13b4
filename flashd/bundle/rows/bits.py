"""Packs integers of 1, 2, 3, 4 and 8 bits into bytes and unpacks them."""

from __future__ import annotations

import numpy as np

from flashd.bundle.rows.kinds import Bytes, Codes


def pack_bits(q: Bytes, bits: int) -> Bytes:
    """Integers [..., K] uint8 -> packed bytes [..., K * bits / 8]. The first integer of a byte is in its low bits.

    Of 3 bits, three bytes hold eight. Each has two whole ones in its low bits. Above them the first byte has the
    lower two bits of the seventh, the second those of the eighth, and the third the upper bit of each. All first
    bytes come first, then all second ones.
    """
    if bits == 3:
        w = np.moveaxis(q.reshape(*q.shape[:-1], -1, 8), -1, 0)  # [8, ..., K / 8]
        above = (w[6] & 3, w[7] & 3, w[6] >> 2 | w[7] >> 2 << 1)
        thirds = [w[2 * i] | w[2 * i + 1] << 3 | above[i] << 6 for i in range(3)]
        return np.asarray(np.concatenate(thirds, axis=-1), np.uint8)
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
        first, second, third = thirds = np.split(q, 3, axis=-1)  # [..., K / 8] each
        whole = [part for byte in thirds for part in (byte & 7, byte >> 3 & 7)]
        w = [*whole, first >> 6 | third >> 4 & 4, second >> 6 | third >> 5 & 4]
        return np.stack(w, axis=-1).reshape(*q.shape[:-1], -1)
    step, most = 8 // bits, (1 << bits) - 1
    out = np.empty((*q.shape[:-1], q.shape[-1] * step), np.uint8)
    for i in range(step):
        np.bitwise_and(q >> (i * bits), most, out=out[..., i::step])
    return out


def as_nibbles(q: Bytes, bits: int) -> Bytes:
    """Packed integers of 3 or 2 bits [..., K * bits / 8, n] as nibbles [..., K / 2, n] that stand for as much.

    The n rows lie side by side.
    """
    if bits == 2:
        pairs = [q & 3 | (q & 12) << 2, q >> 4 & 3 | (q & 192) >> 2]
    else:
        first, second, third = thirds = np.split(q, 3, axis=-2)  # [..., K / 8, n] each
        pairs = [byte & 7 | (byte & 56) << 1 for byte in thirds]
        pairs.append(first >> 6 | third >> 4 & 4 | (second >> 6 | third >> 5 & 4) << 4)
    nibbles = np.stack(pairs, axis=-2)  # [..., bytes, pairs of a byte, n]
    nibbles += np.uint8(0x66 if bits == 2 else 0x44)  # their zero is 8, and not 2 or 4; none overflows
    return nibbles.reshape(*q.shape[:-2], -1, q.shape[-1])


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
