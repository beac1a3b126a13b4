"""Reads runs of bundle groups from the card: sorted, merged, parallel, direct, checked and ahead of need.

Section 3.2 and 4 of "LLM in a flash": throughput comes from few, large reads with several in flight and no
copy through the page cache, which on a small board also costs the RAM that the window wants.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from flashd.bundle.layout import PAGE
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import Bytes
from flashd.errors import CardError

log = logging.getLogger(__name__)

READ_BYTES = 3 << 19
"""Bytes of one read, about 1.5 MiB: more gains nothing on any card of the table in DESIGN.md."""

GAP_BYTES = 16 << 10
"""Unwanted bytes that are read rather than skipped. An SD card gives the bandwidth of one 16 KiB read for
each random read, so a smaller gap costs nothing."""

IN_FLIGHT = 3
"""Reads under way at once."""


@dataclass(frozen=True)
class Extent:
    """A contiguous run of groups of one layer, read as one."""

    layer: int
    first: int
    count: int


@dataclass
class CardStats:
    """What has been asked of the card. Times in seconds, sizes in bytes."""

    reads: int = 0
    bytes_read: int = 0
    bytes_wanted: int = 0
    waited: float = 0.0
    """How long the consumer stood still for the card."""


def extents(layer: int, groups: Sequence[int], group_bytes: int) -> list[Extent]:
    """The reads that fetch `groups` of a layer: sorted, merged across gaps up to GAP_BYTES, cut at READ_BYTES."""
    gap, most = GAP_BYTES // group_bytes, max(1, READ_BYTES // group_bytes)
    runs: list[list[int]] = []
    for group in sorted(groups):
        if runs and group - runs[-1][1] <= gap:
            runs[-1][1] = group + 1
        else:
            runs.append([group, group + 1])
    return [
        Extent(layer, first, min(most, stop - first)) for start, stop in runs for first in range(start, stop, most)
    ]


@dataclass(frozen=True)
class _Read:
    extent: Extent
    buffer: mmap.mmap
    groups: Future[Bytes]


class CardStream:
    """Groups in a fixed cyclic order, read ahead by a few extents.

    In exact mode the order in which a pass misses is known, so the reads of the next layer, and of the next
    pass, go on while this layer computes. Not thread-safe: one consumer.

    Args:
        bundle: an open bundle.
        schedule: the extents of one pass, in the order in which they will be taken. It may be empty.
        buffers: how many extents are held or under way.
    """

    def __init__(self, bundle: Bundle, schedule: Sequence[Extent], buffers: int) -> None:
        self.stats = CardStats()
        self._bundle = bundle
        self._group_bytes = bundle.header.group.nbytes
        self._sections = [bundle.section(f"layer.{i}.ffn") for i in range(bundle.header.model.layers)]
        self._schedule = list(schedule)
        self._of_layer = Counter(e.layer for e in self._schedule)
        self._next = 0
        self._reads: deque[_Read] = deque()
        self._fd, self._direct = _open_direct(bundle)
        most = max((e.count for e in self._schedule), default=0)
        self._idle = [mmap.mmap(-1, buffer_bytes(self._group_bytes, most)) for _ in range(buffers)] if most else []
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="card")

    def close(self) -> None:
        self._drain()
        self._pool.shutdown()
        # not closed one by one: a failed read's traceback may still look at its buffer
        self._idle.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_ahead(self) -> None:
        """Starts as many of the next reads as there are idle buffers."""
        while self._idle and self._schedule:
            extent, buffer = self._schedule[self._next], self._idle.pop()
            self._reads.append(_Read(extent, buffer, self._pool.submit(self._read, extent, buffer)))
            self._next = (self._next + 1) % len(self._schedule)

    def layer(self, layer: int) -> Iterator[tuple[Extent, Bytes]]:
        """The extents of a layer in order, each with its groups [count, group bytes] uint8.

        Layers are taken in the schedule's order; `restart` goes back to the first. The bytes are good until the
        next one is taken. Raises CardError, DamagedRun.
        """
        for _ in range(self._of_layer[layer]):
            self.read_ahead()
            read = self._reads.popleft()
            started = time.perf_counter()
            try:
                groups = read.groups.result()
                self.stats.waited += time.perf_counter() - started
                yield read.extent, groups
            finally:
                self._idle.append(read.buffer)
                self.read_ahead()

    def restart(self) -> None:
        """Forgets what is under way: the next extent taken is the first of a pass."""
        self._drain()
        self._next = 0

    def _drain(self) -> None:
        for read in self._reads:
            read.groups.cancel()
        for read in self._reads:
            if not read.groups.cancelled():
                read.groups.exception()
            self._idle.append(read.buffer)
        self._reads.clear()

    def _read(self, extent: Extent, buffer: mmap.mmap) -> Bytes:
        section = self._sections[extent.layer]
        length = extent.count * self._group_bytes
        offset = section.offset + extent.first * self._group_bytes
        start = offset // PAGE * PAGE
        self._fill(memoryview(buffer)[: -(-(offset + length - start) // PAGE) * PAGE], start, offset + length)
        data = memoryview(buffer)[offset - start : offset - start + length]
        self._bundle.check(section, extent.first, data)
        self.stats.bytes_wanted += length
        return np.frombuffer(data, np.uint8).reshape(extent.count, self._group_bytes)

    def _fill(self, view: memoryview, start: int, needed: int) -> None:
        """Reads at `start` until byte `needed` of the file has come."""
        at = start
        while at < needed:
            try:
                n = os.preadv(self._fd, [view[at - start :]], at)
            except OSError as error:
                if error.errno == errno.EINVAL and self._direct:
                    self._fall_back()
                    continue
                raise CardError(f"{self._bundle.path}: reading at byte {at}: {error.strerror}") from error
            if n == 0:
                raise CardError(f"{self._bundle.path}: the file ends at byte {at}; was it replaced?")
            at += n
            self.stats.reads += 1
            self.stats.bytes_read += n

    def _fall_back(self) -> None:
        if self._direct:
            self._direct = False
            log.warning("%s: no direct reads on this file system; reading through the page cache", self._bundle.path)
            os.close(self._fd)
            self._fd = os.open(self._bundle.path, os.O_RDONLY | os.O_CLOEXEC)


def buffer_bytes(group_bytes: int, groups: int) -> int:
    """Bytes of a buffer that takes `groups` groups from any offset, whole pages."""
    return (-(-groups * group_bytes // PAGE) + 2) * PAGE


def _open_direct(bundle: Bundle) -> tuple[int, bool]:
    """A descriptor that reads past the page cache where the file system can, and whether it does."""
    try:
        return os.open(bundle.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise CardError(f"{bundle.path}: {error.strerror}") from error
    log.warning("%s: no direct reads on this file system; reading through the page cache", bundle.path)
    return os.open(bundle.path, os.O_RDONLY | os.O_CLOEXEC), False


def layer_schedule(missing: Iterable[Sequence[int]], group_bytes: int) -> list[Extent]:
    """The extents of one pass, given each layer's missing groups."""
    return [e for layer, groups in enumerate(missing) for e in extents(layer, groups, group_bytes)]
