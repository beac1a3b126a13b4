"""Reads runs of bundle groups from the card: sorted, merged, parallel, direct, checked and ahead of need.

Section 3.2 and 4 of "LLM in a flash": throughput comes from few, large reads with several in flight and no
copy through the page cache, which on a small board also costs the RAM that the window wants.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashd.bundle.file import CardFile
from flashd.bundle.layout import PAGE, DamagedRun
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import Bytes
from flashd.engine.cardspeed import CardSpeed
from flashd.errors import CardError

log = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int32]

READ_BYTES = 3 << 19
"""Bytes of one read, about 1.5 MiB: more gains nothing on any card of the table in DESIGN.md."""

GAP_BYTES = 16 << 10
"""Unwanted bytes that are read rather than skipped. An SD card gives the bandwidth of one 16 KiB read for
each random read, so a smaller gap costs nothing."""

MOST_GAP_BYTES = 256 << 10
"""However slow a card is to start a read."""

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


def gap_bytes(speed: CardSpeed | None) -> int:
    """Unwanted bytes that cost no more than another read: what comes in the time of one, where that was measured."""
    if speed is None or speed.reads_per_second <= 0:
        return GAP_BYTES
    return int(min(max(speed.bandwidth / speed.reads_per_second, PAGE), MOST_GAP_BYTES))


def extents(layer: int, groups: Sequence[int], group_bytes: int, unwanted: int = GAP_BYTES) -> list[Extent]:
    """The reads that fetch `groups` of a layer: sorted, merged across `unwanted` bytes, cut at READ_BYTES."""
    gap, most = unwanted // group_bytes, max(1, READ_BYTES // group_bytes)
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
    wanted: int
    groups: Future[Bytes]


class _CardReads:
    """Reads of extents under way, in `buffers` buffers of up to `most` units. Not thread-safe: one consumer."""

    def __init__(self, bundle: Bundle, most: int, buffers: int) -> None:
        self.stats = CardStats()
        self._bundle = bundle
        self._unit_bytes = bundle.header.unit_bytes
        self._sections = [bundle.section(f"layer.{i}.ffn") for i in range(bundle.header.model.layers)]
        self._reads: deque[_Read] = deque()
        self._file = CardFile(bundle.path, bundle.patience, direct=True, opened=bundle.file)
        self._counting = threading.Lock()
        self._idle = [mmap.mmap(-1, buffer_bytes(self._unit_bytes, most)) for _ in range(buffers)] if most else []
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="card")

    def close(self) -> None:
        self._drain()
        self._pool.shutdown()
        # not closed one by one: a failed read's traceback may still look at its buffer
        self._idle.clear()
        self._file.close()

    def _submit(self, extent: Extent, wanted: int) -> None:
        """Starts a read into an idle buffer. Of its units so many are wanted."""
        buffer = self._idle.pop()
        future = self._pool.submit(self._read, extent, buffer, wanted)
        self._reads.append(_Read(extent, buffer, wanted, future))

    def _result(self, read: _Read) -> Bytes:
        started, ahead = time.perf_counter(), read.groups.done()
        try:
            return read.groups.result()
        except CardError:
            if not ahead:
                raise
            # it failed some time ago, and the card may be back
            return self._read(read.extent, read.buffer, read.wanted)
        finally:
            self.stats.waited += time.perf_counter() - started

    def _drain(self) -> None:
        for read in self._reads:
            read.groups.cancel()
        for read in self._reads:
            if not read.groups.cancelled():
                read.groups.exception()
            self._idle.append(read.buffer)
        self._reads.clear()

    def _read(self, extent: Extent, buffer: mmap.mmap, wanted: int) -> Bytes:
        section = self._sections[extent.layer]
        length = extent.count * self._unit_bytes
        offset = section.offset + extent.first * self._unit_bytes
        start, nbytes = pages_of(offset, length)
        pages = memoryview(buffer)[:nbytes]
        data = memoryview(buffer)[offset - start : offset - start + length]
        self._fill(pages, start, offset + length)
        try:
            self._bundle.check(section, extent.first, data)
        except DamagedRun as error:
            log.info("%s; reading it once more", error)
            self._file.forget(start, len(pages))
            self._fill(pages, start, offset + length)
            self._bundle.check(section, extent.first, data)
        with self._counting:
            self.stats.bytes_wanted += wanted * self._unit_bytes
        return np.frombuffer(data, np.uint8).reshape(extent.count, self._unit_bytes)

    def _fill(self, pages: memoryview, start: int, needed: int) -> None:
        reads, nbytes = self._file.fill(pages, start, needed)
        with self._counting:
            self.stats.reads += reads
            self.stats.bytes_read += nbytes


class CardPicks(_CardReads):
    """Units that nobody knew of before: the reads that fetch them go on side by side.

    Args:
        bundle: an open bundle.
        gap: unwanted bytes that are read rather than skipped.
        buffers: how many extents are held or under way.
    """

    def __init__(self, bundle: Bundle, gap: int, buffers: int) -> None:
        super().__init__(bundle, max(1, READ_BYTES // bundle.header.unit_bytes), buffers)
        self._gap = gap

    def forget_counts(self) -> None:
        """Counts anew: what filled the windows at first is not what tokens cost."""
        self.stats = CardStats()

    def take(self, layer: int, units: Numbers) -> Iterator[tuple[Numbers, Bytes]]:
        """Some of `units`, ascending, at a time, and their bytes [n, unit bytes]. Raises CardError, DamagedRun."""
        waiting = deque(extents(layer, units.tolist(), self._unit_bytes, self._gap))
        try:
            while waiting or self._reads:
                while waiting and self._idle:
                    self._submit(waiting[0], len(_within(waiting[0], units)))
                    waiting.popleft()
                read = self._reads.popleft()
                try:
                    raw = self._result(read)
                    here = _within(read.extent, units)
                    yield here, raw[here - read.extent.first]
                finally:
                    self._idle.append(read.buffer)
        finally:
            self._drain()


def _within(extent: Extent, units: Numbers) -> Numbers:
    """Those of `units`, ascending, that an extent fetches."""
    start, stop = np.searchsorted(units, (extent.first, extent.first + extent.count))
    return units[start:stop]


class CardStream(_CardReads):
    """Groups in a fixed cyclic order, read ahead by a few extents.

    In exact mode the order in which a pass misses is known, so the reads of the next layer, and of the next
    pass, go on while this layer computes.

    Args:
        bundle: an open bundle.
        schedule: the extents of one pass, in the order in which they will be taken. It may be empty.
        buffers: how many extents are held or under way.
    """

    def __init__(self, bundle: Bundle, schedule: Sequence[Extent], buffers: int) -> None:
        super().__init__(bundle, max((e.count for e in schedule), default=0), buffers)
        self._schedule = list(schedule)
        self._of_layer = Counter(e.layer for e in self._schedule)
        self._next = 0

    def read_ahead(self) -> None:
        """Starts as many of the next reads as there are idle buffers."""
        while self._idle and self._schedule:
            extent = self._schedule[self._next]
            self._submit(extent, extent.count)
            self._next = (self._next + 1) % len(self._schedule)

    def layer(self, layer: int) -> Iterator[tuple[Extent, Bytes]]:
        """The extents of a layer in order, each with its groups [count, group bytes] uint8.

        Layers are taken in the schedule's order; `restart` goes back to the first. The bytes are good until the
        next one is taken. Raises CardError, DamagedRun.
        """
        for _ in range(self._of_layer[layer]):
            self.read_ahead()
            read = self._reads.popleft()
            try:
                yield read.extent, self._result(read)
            finally:
                self._idle.append(read.buffer)
                self.read_ahead()

    def restart(self) -> None:
        """Forgets what is under way: the next extent taken is the first of a pass."""
        self._drain()
        self._next = 0


def pages_of(offset: int, length: int) -> tuple[int, int]:
    """(start, bytes) of the whole pages that hold `length` bytes at `offset`, which is what the card gives."""
    start = offset // PAGE * PAGE
    return start, -(-(offset + length - start) // PAGE) * PAGE


def buffer_bytes(group_bytes: int, groups: int) -> int:
    """Bytes of a buffer that takes `groups` groups from any offset, whole pages."""
    return (-(-groups * group_bytes // PAGE) + 2) * PAGE


def layer_schedule(missing: Iterable[Sequence[int]], group_bytes: int, gap: int = GAP_BYTES) -> list[Extent]:
    """The extents of one pass, given each layer's missing groups."""
    return [e for layer, groups in enumerate(missing) for e in extents(layer, groups, group_bytes, gap)]
