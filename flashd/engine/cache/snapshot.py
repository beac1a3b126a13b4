"""A snapshot: a file with the keys and values of a text's first tokens, from which a later process goes on.

    0   8  magic
    8   4  version             uint32, little endian as everything here
    12  4  header length       bytes of JSON that follow the prefix
    16  8  header digest       XXH3-64 of that JSON
    24  8  file length         bytes of the whole file
    32     header              JSON, see Header
           runs                of 16 tokens, the last may have fewer: for each layer the keys, then the values, of
                               each head [tokens, head dim] float32
           logits              float32 [V] behind the last token, where they are kept

A run is what is checked, and so read, as one, straight into the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import msgspec
import numpy as np
import xxhash

import flashd
from flashd.bundle.prefix import PREFIX, Prefix, digest, sealed
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Floats
from flashd.engine.model.kv_cache import KvCache
from flashd.errors import NOT_JSON, DataError
from flashd.system.new_file import NewFile

MAGIC = b"\x93FLSNAP\n"
VERSION = 1
RUN = 16
"""Tokens of a run."""
MAX_HEADER = 1 << 20


class BadSnapshot(DataError):
    """The file is damaged, cut short, of another version or of another bundle."""


@dataclass(frozen=True)
class Source:
    """What a snapshot is made of: a bundle, by a version of flashd, which might compute otherwise than the next."""

    key: str
    vocabulary: int

    @classmethod
    def of(cls, bundle: Bundle) -> Source:
        key = digest(f"{VERSION} {flashd.__version__} {bundle.digest:016x}".encode())
        return cls(f"{key:016x}", bundle.header.model.vocabulary)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a snapshot says of itself."""

    source: str
    tokens: list[int]
    checksums: list[int]  # XXH3-64 of each run, then of the logits
    logits: bool

    def usable(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens can be had: those of whole runs, or all that there are."""
        n = shared(self.tokens, prompt)
        return n if n == len(self.tokens) else n // RUN * RUN

    def answers(self, prompt: Sequence[int]) -> bool:
        """Whether what follows the prompt can be had, with no pass at all."""
        return self.logits and self.tokens == list(prompt)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def nbytes(tokens: int, cache: KvCache, source: Source) -> int:
    """Bytes of a snapshot, logits included, without its header."""
    return tokens * cache.token_bytes + 4 * source.vocabulary


def save(path: Path, source: Source, tokens: Sequence[int], cache: KvCache, logits: Floats | None) -> None:
    """Writes the cache's first tokens, which are `tokens`, and the logits [V] behind them if they are to be kept.

    Raises CannotWrite.
    """
    data = list(_pieces(len(tokens), cache))
    if logits is not None:
        data.append([logits])
    header = Header(
        source=source.key, tokens=list(tokens), checksums=[_checksum(run) for run in data], logits=logits is not None
    )
    body = msgspec.json.encode(header)
    length = PREFIX.size + len(body) + sum(piece.nbytes for run in data for piece in run)
    at = PREFIX.size + len(body)
    with NewFile(path, 0o600) as new:
        new.write(sealed(MAGIC, VERSION, body, length), 0)
        for piece in (piece for run in data for piece in run):
            new.write(piece.data.cast("B"), at)
            at += piece.nbytes
        new.publish()


def read_header(file: BufferedReader, source: Source, cache: KvCache) -> Header:
    """The header of an open file, whose size is then right; the file stands behind it. Raises BadSnapshot."""
    prefix = Prefix.read(file.read(PREFIX.size), MAGIC)
    if prefix is None:
        raise BadSnapshot("not a snapshot")
    if prefix.version != VERSION:
        raise BadSnapshot(f"a snapshot of format {prefix.version}, this flashd reads {VERSION}")
    body = file.read(prefix.length) if prefix.length <= MAX_HEADER else b""
    if digest(body) != prefix.digest:
        raise BadSnapshot("the header is damaged")
    try:
        header = msgspec.json.decode(body, type=Header)
    except NOT_JSON as error:
        raise BadSnapshot(f"the header does not make sense: {error}") from error
    if header.source != source.key:
        raise BadSnapshot("it is of another bundle")
    start, tokens = file.tell(), len(header.tokens)
    right = start + tokens * cache.token_bytes + 4 * source.vocabulary * header.logits
    there = file.seek(0, 2)
    file.seek(start)
    if not there == prefix.file_length == right or len(header.checksums) != -(-tokens // RUN) + header.logits:
        raise BadSnapshot(f"{there} bytes of {prefix.file_length}, and its tokens need {right}")
    return header


def restore(path: Path, source: Source, prompt: Sequence[int], cache: KvCache) -> Floats | None:
    """Reads on from the cache's tokens, which are the prompt's first, as far as the snapshot goes.

    Returns the logits [V] behind the prompt where the snapshot is of it all and has them.

    Raises BadSnapshot, OSError; the cache then counts what came before what is wrong.
    """
    with path.open("rb") as file:
        header = read_header(file, source, cache)
        stop, start = header.usable(prompt), cache.length // RUN * RUN
        cache.truncate(start)
        cache.reserve(stop)
        data = file.tell()
        file.seek(data + start * cache.token_bytes)
        for at in range(start, stop, RUN):
            end = min(at + RUN, stop)
            _fill(file, list(cache.parts(at, end)), header.checksums[at // RUN], f"tokens {at} to {end}")
            cache.advance(end - at)
        if not header.answers(prompt):
            return None
        logits = np.empty(source.vocabulary, np.float32)
        _fill(file, [logits], header.checksums[-1], "the logits")
        return logits


def _pieces(tokens: int, cache: KvCache) -> Iterator[list[Floats]]:
    """The cache's memory, run by run."""
    for at in range(0, tokens, RUN):
        yield list(cache.parts(at, min(at + RUN, tokens)))


def _fill(file: BufferedReader, pieces: list[Floats], checksum: int, what: str) -> None:
    for piece in pieces:
        if file.readinto(piece.data.cast("B")) != piece.nbytes:
            raise BadSnapshot(f"cut short at {what}")
    if _checksum(pieces) != checksum:
        raise BadSnapshot(f"{what} are damaged")


def _checksum(pieces: list[Floats]) -> int:
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece.data.cast("B"))
    return state.intdigest()
