"""The first bytes of a bundle or a snapshot, and the sizes and checksums that hold throughout the file.

flashd/bundle/FORMAT.md describes the whole file.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

MAGIC = b"\x93FLASHD\n"
VERSION = 5
PLAIN_VERSION = 4
"""Of bundles in which nothing is narrowed, selected within experts or by a gate: the flashd before this one reads
them too."""
PAGE = 4096
GAP_BYTES = 16 << 10
"""Unwanted bytes that are read rather than skipped. An SD card gives the bandwidth of one 16 KiB read for
each random read, so a smaller gap costs nothing."""
PLAIN_RUN = 1 << 20
ROWS_OF_A_RUN = 16
MAX_HEADER = 4 << 20
PREFIX = struct.Struct("<8sIIQQ")


def next_page(offset: int) -> int:
    """The next page boundary."""
    return -(-offset // PAGE) * PAGE


def digest(data: bytes | memoryview) -> int:
    """The checksum of one run, XXH3-64: 10 GB/s where zlib's CRC-32 gives 1."""
    return xxhash.xxh3_64_intdigest(data)


class Prefix(NamedTuple):
    """What a bundle begins with, and a snapshot too, with another magic."""

    magic: bytes
    version: int
    length: int  # of the header, which follows
    digest: int  # of the header
    file_length: int

    @classmethod
    def read(cls, data: bytes, magic: bytes) -> Prefix | None:
        """From a file's first 32 bytes; None where they do not start with `magic`."""
        if len(data) < PREFIX.size or not data.startswith(magic):
            return None
        return cls(*PREFIX.unpack(data[: PREFIX.size]))


def sealed(magic: bytes, version: int, body: bytes, file_length: int) -> bytes:
    """Prefix and header, ready to be written at offset 0."""
    return PREFIX.pack(magic, version, len(body), digest(body), file_length) + body
