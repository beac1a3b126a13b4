"""A snapshot: a file with the keys and values of a text's first tokens. A later process can go on from it.

    0   8  magic
    8   4  version             uint32, little endian as everything here
    12  4  header length       bytes of JSON that follow the prefix
    16  8  header digest       XXH3-64 of that JSON
    24  8  file length         bytes of the whole file
    32     header              JSON, see Header
           runs                of 16 tokens each, the last may have fewer: for each layer the keys, then the values,
                               of each head, as the KV cache keeps them: [tokens, head dim] float32, or bytes of
                               rows, see model.kv_rows
           states              of a model with layers that have a state in place of keys: those behind the last token,
                               float32, layer by layer; the rows that a sum lacks are among the layer's rows
           logits              [V] float32 behind the last token, if the header says so

Each run has a checksum, and so have the states. A run is read whole, straight into the cache. A snapshot with states
is good for texts that begin with all of its tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import xxhash

import flashd
from flashd.bundle.prefix import PREFIX, Prefix, digest, sealed
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.kv_cache import KvCache
from flashd.engine.model.kv_rows import Kept
from flashd.engine.planning.plan import Plan
from flashd.errors import NOT_JSON, DataError
from flashd.graphs.kinds.recurrent import REWIND
from flashd.system.new_file import NewFile
from flashd.system.plain_file import open_plain

MAGIC = b"\x93FLSNAP\n"
VERSION = 3
RUN = 16
"""Tokens of a run."""
MAX_HEADER = 1 << 20
SETTLED_BYTES = 4 << 20
"""So much is written before the card is waited for: the whole of a snapshot may take a slow one a minute."""


Pending = Annotated[int, msgspec.Meta(ge=0, le=REWIND)]


class BadSnapshot(DataError):
    """The file is damaged, cut short, of another version or of another bundle."""


@dataclass(frozen=True)
class Origin:
    """The bundle, the version of flashd and the arithmetic that a snapshot comes from.

    Another version might compute otherwise.
    """

    key: str  # 16 hexadecimal digits of a digest of all three
    vocabulary: int  # V

    @classmethod
    def of(cls, bundle: Bundle, plan: Plan) -> Origin:
        key = digest(f"{VERSION} {flashd.__version__} {bundle.digest:016x} {plan.computed}".encode())
        return cls(f"{key:016x}", bundle.header.model.vocabulary)


class SnapshotHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON header of a snapshot."""

    source: str  # Origin.key
    tokens: list[int]
    checksums: list[int]  # XXH3-64 of each run, then of the states, then of the logits
    logits: bool
    states: bool = False
    pending: list[Pending] = []  # of each layer that has a state, rows that its sum lacks

    def usable(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens the snapshot gives: those of whole runs, or all of its own.

        With states it gives all or none.
        """
        n = shared(self.tokens, prompt)
        if self.states:
            return n if n == len(self.tokens) else 0
        return n if n == len(self.tokens) else n // RUN * RUN

    def answers(self, prompt: Sequence[int]) -> bool:
        """Whether the snapshot has the logits behind the prompt, so that no pass is needed."""
        return self.logits and self.tokens == list(prompt)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def nbytes(tokens: int, cache: KvCache, origin: Origin) -> int:
    """Bytes of a snapshot of so many tokens with logits, without its header."""
    return tokens * cache.token_bytes + cache.state_bytes + 4 * origin.vocabulary


def save(
    path: Path, origin: Origin, tokens: Sequence[int], cache: KvCache, logits: Floats | None,
    on_part: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Writes keys and values of `tokens`, which the cache begins with, and the logits [V] behind them if given.

    The cache knows the states behind them, see KvCache.longest. `on_part` is called when the card has taken a part.
    Raises CannotWrite.
    """
    data: list[Sequence[Kept]] = list(_pieces(len(tokens), cache))
    states = cache.states(len(tokens))
    if states:
        data.append([part for state in states for part in state.parts])
    if logits is not None:
        data.append([logits])
    header = SnapshotHeader(
        source=origin.key, tokens=list(tokens), checksums=[_checksum(run) for run in data], logits=logits is not None,
        states=bool(states), pending=[state.pending for state in states],
    )  # fmt: skip
    body = msgspec.json.encode(header)
    length = PREFIX.size + len(body) + sum(piece.nbytes for run in data for piece in run)
    at = settled = PREFIX.size + len(body)
    with NewFile(path, 0o600) as new:
        new.write(sealed(MAGIC, VERSION, body, length), 0)
        for piece in (piece for run in data for piece in run):
            new.write(piece.data.cast("B"), at)
            at += piece.nbytes
            if at - settled >= SETTLED_BYTES:
                new.settle()
                settled = at
                on_part()
        new.publish()


def read_header(file: BufferedReader, origin: Origin, cache: KvCache) -> SnapshotHeader:
    """Reads the header of an open file and checks the file's size. The runs come next in the file.

    Raises BadSnapshot.
    """
    prefix = Prefix.read(file.read(PREFIX.size), MAGIC)
    if prefix is None:
        raise BadSnapshot("not a snapshot")
    if prefix.version != VERSION:
        raise BadSnapshot(f"a snapshot of format {prefix.version}, this flashd reads {VERSION}")
    body = file.read(prefix.length) if prefix.length <= MAX_HEADER else b""
    if digest(body) != prefix.digest:
        raise BadSnapshot("the header is damaged")
    try:
        header = msgspec.json.decode(body, type=SnapshotHeader)
    except NOT_JSON as error:
        raise BadSnapshot(f"the header does not make sense: {error}") from error
    if header.source != origin.key:
        raise BadSnapshot("it belongs to another bundle or another version of flashd")
    start, tokens = file.tell(), len(header.tokens)
    if header.states != bool(cache.state_bytes) or len(header.pending) != cache.stateful:
        raise BadSnapshot("it has states and the model has none, or the other way round")
    states = cache.states_bytes(header.pending)
    right = start + tokens * cache.token_bytes + states + 4 * origin.vocabulary * header.logits
    checksums = -(-tokens // RUN) + header.states + header.logits
    there = file.seek(0, 2)
    file.seek(start)
    if not there == prefix.file_length == right or len(header.checksums) != checksums:
        raise BadSnapshot(f"it has {there} bytes of {prefix.file_length}, and its tokens need {right}")
    return header


def restore(path: Path, origin: Origin, prompt: Sequence[int], cache: KvCache) -> Floats | None:
    """Fills the cache with the prompt's tokens behind those that it has, as far as the snapshot goes.

    Returns the logits [V] behind the prompt, if the snapshot has all of the prompt and the logits; else None.

    Raises BadSnapshot, OSError. The cache then counts the tokens that came before the fault.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        header = read_header(file, origin, cache)
        if header.states:
            _resume(file, header, cache)
        else:
            stop, start = header.usable(prompt), cache.length // RUN * RUN
            cache.truncate(start)
            cache.reserve(stop)
            file.seek(file.tell() + start * cache.token_bytes)
            for at, end in _read_runs(file, header, cache, start, stop):
                cache.advance(end - at)
        if not header.answers(prompt):
            return None
        logits = np.empty(origin.vocabulary, np.float32)
        _fill(file, [logits], header.checksums[-1], "the logits")
        return logits


def _read_runs(
    file: BufferedReader, header: SnapshotHeader, cache: KvCache, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Reads the runs of tokens `start` to `stop` into the cache. Yields where each begins and ends."""
    for at in range(start, stop, RUN):
        end = min(at + RUN, stop)
        _fill(file, list(cache.parts(at, end)), header.checksums[at // RUN], f"tokens {at} to {end}")
        yield at, end


def _resume(file: BufferedReader, header: SnapshotHeader, cache: KvCache) -> None:
    """Fills the cache with all tokens of a snapshot with states. If it is damaged the cache is empty."""
    stop = len(header.tokens)
    cache.truncate(0)
    cache.reserve(stop)
    for _ in _read_runs(file, header, cache, 0, stop):
        """They count when the states are there too."""
    states = cache.empty_states(header.pending)
    parts = [part for state in states for part in state.parts]
    _fill(file, parts, header.checksums[-(-stop // RUN)], "the states")
    cache.resume(stop, states)


def _pieces(tokens: int, cache: KvCache) -> Iterator[list[Kept]]:
    """The cache's memory of the first `tokens` tokens, run by run."""
    for at in range(0, tokens, RUN):
        yield list(cache.parts(at, min(at + RUN, tokens)))


def _fill(file: BufferedReader, pieces: Sequence[Kept], checksum: int, what: str) -> None:
    for piece in pieces:
        if file.readinto(piece.data.cast("B")) != piece.nbytes:
            raise BadSnapshot(f"cut short at {what}")
    if _checksum(pieces) != checksum:
        raise BadSnapshot(f"{what} are damaged")


def _checksum(pieces: Sequence[Kept]) -> int:
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece.data.cast("B"))
    return state.intdigest()
