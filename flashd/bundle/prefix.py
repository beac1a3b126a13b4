"""The prefix: the first 32 bytes of a bundle or a snapshot. Also the sizes and the checksum that the whole file uses.

flashd/bundle/FORMAT.md describes the whole file.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

MAGIC = b"\x93FLASHD\n"
"""A bundle begins with it."""

VERSION = 7
"""The format. A bundle of another one is packed again."""

PAGE = 4096
"""Bytes. Each section begins at a multiple of it."""

GAP_BYTES = 16 << 10
"""A gap of so many unwanted bytes is read rather than skipped. An SD card starts a read in the time that it needs for
16 KiB, so reading a smaller gap costs nothing."""

PLAIN_RUN = 1 << 20
"""Bytes that share a checksum, in sections that are only read whole."""

ROWS_OF_A_RUN = 16
"""Rows that share a checksum, in tables of which single rows are read."""

MAX_HEADER = 4 << 20
"""The most bytes of a header."""

PREFIX = struct.Struct("<8sIIQQ")
"""The fields of Prefix."""


def next_page(offset: int) -> int:
    """The first multiple of PAGE that is not below `offset`."""
    return -(-offset // PAGE) * PAGE


def digest(data: bytes | memoryview) -> int:
    """XXH3-64 of some bytes, such as a run. It is ten times as fast as zlib's CRC-32."""
    return xxhash.xxh3_64_intdigest(data)


class Prefix(NamedTuple):
    """The first 32 bytes of a bundle. A snapshot begins so too, with another magic."""

    magic: bytes
    version: int
    length: int  # bytes of the header, which follows
    digest: int  # of the header
    file_length: int  # bytes of the whole file

    @classmethod
    def read(cls, data: bytes, magic: bytes) -> Prefix | None:
        """Reads a file's first 32 bytes. None if they do not start with `magic`."""
        if len(data) < PREFIX.size or not data.startswith(magic):
            return None
        return cls(*PREFIX.unpack(data[: PREFIX.size]))


def sealed(magic: bytes, version: int, body: bytes, file_length: int) -> bytes:
    """The bytes of a prefix and of `body`, the header, which stand at offset 0."""
    return PREFIX.pack(magic, version, len(body), digest(body), file_length) + body
