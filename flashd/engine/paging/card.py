"""Reads of groups and neurons from the card: sorted, merged, in parallel, checked and ahead of need.

Throughput comes from few large reads with several in flight ("LLM in a flash", sections 3.2 and 4). They bypass the
page cache, which costs a copy and, on a small board, the RAM that the window wants.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.errors import DamagedRun
from flashd.bundle.file import CardFile
from flashd.bundle.prefix import GAP_BYTES, PAGE
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Bytes
from flashd.engine.model.contract import CardStats
from flashd.engine.paging.card_speed import IN_FLIGHT, CardSpeed
from flashd.errors import CardError

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]
"""[n] int32: numbers of units."""

READ_BYTES = 3 << 19
"""The most bytes of one read. A larger read is no faster on SD cards, USB SSDs or NVMe."""

MOST_GAP_BYTES = 256 << 10
"""The widest gap that is read rather than skipped, however slow a card is to start a read."""

Make = Callable[["Extent", Bytes], Any]
"""Makes of what was read what its taker wants, in the thread that read it: to copy takes a while too."""


@dataclass(frozen=True)
class Extent:
    """Consecutive groups of one section, fetched by one read. In the head 16 rows count as a group."""

    section: int  # its number in Header.paged_sections, of which the head is the last
    first: int  # group
    count: int


def gap_bytes(speed: CardSpeed | None) -> int:
    """The widest gap, in bytes, that is as fast to read as to skip: what the card gives in the time of one more read.

    If the card was not measured this is GAP_BYTES.
    """
    if speed is None or speed.reads_per_second <= 0:
        return GAP_BYTES
    return int(min(max(speed.bandwidth / speed.reads_per_second, PAGE), MOST_GAP_BYTES))


def units_of_a_read(unit_bytes: int) -> int:
    """The most units of `unit_bytes` bytes that one read fetches; at least 1."""
    return max(1, READ_BYTES // unit_bytes)


def extents(section: int, groups: Sequence[int], group_bytes: int, unwanted: int = GAP_BYTES) -> list[Extent]:
    """The reads that fetch `groups` of a section, ascending. Gaps up to `unwanted` bytes are read too."""
    gap, most = unwanted // group_bytes, units_of_a_read(group_bytes)
    runs: list[list[int]] = []
    for group in sorted(groups):
        if runs and group - runs[-1][1] <= gap:
            runs[-1][1] = group + 1
        else:
            runs.append([group, group + 1])
    return [
        Extent(section, first, min(most, stop - first)) for start, stop in runs for first in range(start, stop, most)
    ]


def as_read(_: Extent, raw: Bytes) -> Bytes:
    """A Make that leaves the bytes as they are."""
    return raw


@dataclass(frozen=True)
class _Read:
    extent: Extent
    buffer: mmap.mmap
    wanted: int  # of its groups
    made: Future[Any]


class _Card:
    """Reads under way into a fixed number of buffers. It is not thread-safe: it has one consumer.

    Args:
        bundle: an open bundle.
        most: bytes of the longest extent, 0 where nothing is to be read.
        buffers: how many extents are held or under way.
        make: see Make.
        depth: reads under way at once.
    """

    def __init__(self, bundle: Bundle, most: int, buffers: int, make: Make = as_read, depth: int = IN_FLIGHT) -> None:
        self.stats = CardStats()
        self._bundle, self._make = bundle, make
        header = bundle.header
        self._sections = [bundle.section(name) for name in header.paged_sections]
        self._records = [*(section.run for section in self._sections[:-1]), header.row_format("head").nbytes]
        self._reads: deque[_Read] = deque()
        self._file = CardFile(bundle.path, bundle.patience, direct=True, opened=bundle.file)
        self._gave_up: CardError | None = None  # the error of a read that waited for the card in vain
        self._counting = threading.Lock()
        self._idle = [mmap.mmap(-1, buffer_bytes(most)) for _ in range(buffers)] if most else []
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="card")

    def close(self) -> None:
        self._drain()
        self._pool.shutdown()
        # not closed one by one: a failed read's traceback may still look at its buffer
        self._idle.clear()
        self._file.close()

    def read_ahead(self) -> None:
        """Starts as many of the next reads as there are idle buffers."""
        raise NotImplementedError

    def _start(self, extent: Extent, wanted: int | None = None) -> None:
        """Starts a read into an idle buffer, behind those under way. `wanted` of its groups are wanted; None: all."""
        buffer, wanted = self._idle.pop(), extent.count if wanted is None else wanted
        self._reads.append(_Read(extent, buffer, wanted, self._pool.submit(self._read, extent, buffer, wanted)))

    def _taken(self) -> Iterator[tuple[Extent, Any]]:
        """The first extent under way, when it is there; its buffer is idle when the next is taken."""
        read = self._reads.popleft()
        started, ahead, known = time.perf_counter(), read.made.done(), self._gave_up
        try:
            try:
                made = read.made.result()
            except Exception as error:
                if not ahead and error is not known:
                    raise
                # it failed before it was needed, or because another read gave up: the card may be back by now
                self._gave_up = None
                made = self._read(read.extent, read.buffer, read.wanted)
            self.stats.waited += time.perf_counter() - started
            yield read.extent, made
        finally:
            self._let_go(read.buffer)
            self.read_ahead()

    def _let_go(self, buffer: mmap.mmap) -> None:
        """Takes back the buffer of an extent when the next one is taken."""
        self._idle.append(buffer)

    def _drain(self) -> None:
        for read in self._reads:
            read.made.cancel()
        for read in self._reads:
            if not read.made.cancelled():
                read.made.exception()
            self._idle.append(read.buffer)
        self._reads.clear()
        self._gave_up = None

    def _read(self, extent: Extent, buffer: mmap.mmap, wanted: int) -> Any:
        if self._gave_up is not None:
            raise self._gave_up  # this read would wait as long again
        try:
            raw = self._read_checked(extent, buffer, wanted)
        except CardError as error:
            self._gave_up = error
            raise
        return self._make(extent, raw)

    def _read_checked(self, extent: Extent, buffer: mmap.mmap, wanted: int) -> Bytes:
        section = self._sections[extent.section]
        offset = section.offset + extent.first * section.run
        length = min(extent.count * section.run, section.end - offset)
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
            self.stats.bytes_wanted += length - (extent.count - wanted) * section.run
        return np.frombuffer(data, np.uint8).reshape(-1, self._records[extent.section])

    def _fill(self, pages: memoryview, start: int, needed: int) -> None:
        reads, nbytes = self._file.fill(pages, start, needed)
        with self._counting:
            self.stats.reads += reads
            self.stats.bytes_read += nbytes


class CardStream(_Card):
    """Groups in a fixed cyclic order, read ahead by a few extents. StreamedFfn uses it.

    If every neuron takes part, the order in which passes read is known. So the reads of the next layer, and of the
    next pass, go on while this layer computes.

    Args:
        bundle: an open bundle.
        schedule: the extents of one pass, in the order in which they will be taken. It may be empty. None that
            comes later, see `restart`, has a longer extent.
        buffers: how many extents are taken or under way.
        make: see Make.
        used: of the extents that were taken last, those behind the newest whose bytes are still used.
    """

    def __init__(
        self, bundle: Bundle, schedule: Sequence[Extent], buffers: int, make: Make = as_read, used: int = 0
    ) -> None:
        runs = [section.run for section in map(bundle.section, bundle.header.paged_sections)]
        most = max((e.count * runs[e.section] for e in schedule), default=0)
        super().__init__(bundle, most, buffers + used, make)
        self._used, self._taken_last = used, deque[mmap.mmap]()
        self._follow(schedule)

    def _follow(self, schedule: Sequence[Extent]) -> None:
        self._schedule = list(schedule)
        self._of_section = Counter(e.section for e in self._schedule)
        self._next = 0

    def read_ahead(self) -> None:
        """Starts as many of the next reads as there are idle buffers."""
        while self._idle and self._schedule:
            self._start(self._schedule[self._next])
            self._next = (self._next + 1) % len(self._schedule)

    def section(self, section: int) -> Iterator[tuple[Extent, Any]]:
        """The extents of a section in order, each with what was made of its bytes.

        Take sections in the schedule's order; `restart` goes back to the first. The bytes of an extent are valid
        until `used` and one more are taken. Raises CardError, DamagedRun.
        """
        for _ in range(self._of_section[section]):
            self.read_ahead()
            yield from self._taken()

    def _let_go(self, buffer: mmap.mmap) -> None:
        self._taken_last.append(buffer)
        if len(self._taken_last) > self._used:
            self._idle.append(self._taken_last.popleft())

    def restart(self, schedule: Sequence[Extent] | None = None) -> None:
        """Forgets what is under way, and what was taken.

        The next extent taken is the first of the schedule, which may be a new one.
        """
        self._drain()
        self._idle.extend(self._taken_last)
        self._taken_last.clear()
        self._follow(self._schedule if schedule is None else schedule)


class CardPicks(_Card):
    """Units that are known only when they are needed. Their reads go on side by side. SelectedFfn uses it.

    Args:
        bundle: an open bundle.
        gap: unwanted bytes that are read rather than skipped.
        buffers: the most extents that are held or under way.
    """

    def __init__(self, bundle: Bundle, gap: int, buffers: int) -> None:
        self._unit_bytes = bundle.header.unit_bytes
        super().__init__(bundle, max(READ_BYTES, self._unit_bytes), buffers)
        self._gap = gap
        self._waiting: deque[tuple[Extent, int]] = deque()  # with how many of its units are wanted

    def forget_counts(self) -> None:
        """Starts the counts again. What filled the windows at first is not a cost of tokens."""
        self.stats = CardStats()

    def take(self, layer: int, units: Ids) -> Iterator[tuple[Ids, Bytes]]:
        """Reads `units`, ascending, and yields some at a time [n] with their bytes [n, unit bytes] uint8.

        Raises CardError, DamagedRun.
        """
        picked = extents(layer, units.tolist(), self._unit_bytes, self._gap)
        self._waiting.extend((extent, len(_within(extent, units))) for extent in picked)
        try:
            self.read_ahead()
            while self._reads:
                for extent, raw in self._taken():
                    here = _within(extent, units)
                    yield here, raw[here - extent.first]
        finally:
            self._waiting.clear()
            self._drain()

    def read_ahead(self) -> None:
        """Starts as many of the waiting reads as there are idle buffers."""
        while self._idle and self._waiting:
            self._start(*self._waiting.popleft())


def _within(extent: Extent, units: Ids) -> Ids:
    """Those of `units` [n], ascending, that an extent fetches."""
    start, stop = np.searchsorted(units, (extent.first, extent.first + extent.count))
    return units[start:stop]


class CardQueue(_Card):
    """Groups that are known a layer at a time, and guesses at those of the next layer. ExpertFfn uses it.

    Args:
        bundle: an open bundle.
        most: groups of the longest extent.
        buffers: the most extents that are held or under way.
        depth: reads under way at once.
    """

    def __init__(self, bundle: Bundle, most: int, buffers: int, make: Make = as_read, depth: int = IN_FLIGHT) -> None:
        super().__init__(bundle, most * bundle.header.largest_group.nbytes, buffers, make, depth)
        self._asked: deque[Extent] = deque()  # for which no buffer has been idle yet
        self._dropped: list[_Read] = []  # begun for nothing, and not done yet
        self._wanted = 0  # of what is under way and asked for, the first so many

    def want(self, extents: Sequence[Extent]) -> None:
        """Says which extents `take` gives. Guesses that are not among them are dropped."""
        wanted = set(extents)
        reads, self._reads = self._reads, deque()
        for read in reads:
            (self._reads if read.extent in wanted else self._dropped).append(read)
        for read in self._dropped:
            read.made.cancel()
        under_way = {read.extent for read in self._reads}
        self._asked = deque(e for e in extents if e not in under_way)
        self._wanted = len(extents)
        self.read_ahead()

    def guess(self, extents: Iterable[Extent]) -> None:
        """Says which extents the next `want` may name. They are read behind those that are wanted now."""
        self._asked.extend(extents)
        self.read_ahead()

    def take(self) -> Iterator[tuple[Extent, Any]]:
        """What is wanted, each extent with what was made of its groups, the guessed ones first.

        The bytes of an extent are valid until the next is taken. Raises CardError, DamagedRun.
        """
        while self._wanted:
            self._wanted -= 1
            if not self._reads:
                wait([read.made for read in self._dropped], return_when=FIRST_COMPLETED)
                self.read_ahead()
            yield from self._taken()

    def read_ahead(self) -> None:
        """Starts as many of the reads asked for as there are idle buffers."""
        over = [read for read in self._dropped if read.made.done()]
        self._dropped = [read for read in self._dropped if read not in over]
        self._idle.extend(read.buffer for read in over)
        while self._idle and self._asked:
            self._start(self._asked.popleft())

    def restart(self) -> None:
        """Forgets what is wanted and what was guessed."""
        self.want([])
        self._drain()

    def _drain(self) -> None:
        self._reads.extend(self._dropped)
        self._dropped.clear()
        self._asked.clear()
        super()._drain()


def pages_of(offset: int, length: int) -> tuple[int, int]:
    """(start, bytes) of the whole pages that hold `length` bytes at `offset`. Direct reads fetch whole pages."""
    start = offset // PAGE * PAGE
    return start, -(-(offset + length - start) // PAGE) * PAGE


def buffer_bytes(nbytes: int) -> int:
    """Bytes of a buffer, in whole pages, that has room for `nbytes` bytes from any offset."""
    return (-(-nbytes // PAGE) + 2) * PAGE
