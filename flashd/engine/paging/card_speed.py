"""How fast a card reads. It is measured once with direct reads and remembered for the device that the file is on."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from flashd.bundle.prefix import PAGE
from flashd.errors import CardError, InputMissing
from flashd.system.remembered import Remembered

SEQUENTIAL_BYTES, SEQUENTIAL_READ = 48 << 20, 1 << 20
"""Bytes that are read in order, and bytes of each of these reads."""

RANDOM_READS, RANDOM_SECONDS = 400, 1.0
"""The most random reads of one size, and the most seconds that reads of one kind may take."""

RANDOM_SIZES = (4 << 10, 16 << 10, 64 << 10)
"""Bytes of random reads."""

SMALLEST_FILE = 1 << 20
"""Bytes."""

DEPTHS, FASTER = (1, 2, 4), 1.05
"""Reads that are under way at once, and by how much more of them must be faster to be preferred."""

IN_FLIGHT = 2
"""Reads under way at once of a card that was not measured."""


class CardSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """The rates of direct reads of one file, of random ones one at a time."""

    bandwidth: float  # bytes a second, reading a mebibyte at a time in order, `depth` of them under way
    random_reads: dict[int, float]  # bytes of a read -> reads a second, at random places of the file
    when: float  # seconds since 1970
    depth: int = IN_FLIGHT  # large reads under way with which the card is fastest

    @property
    def reads_per_second(self) -> float:
        """Random reads of 4 KiB a second."""
        return self.random_reads[RANDOM_SIZES[0]]


_cards = Remembered("cards.json", CardSpeed, "flashd doctor")


def measure(path: Path) -> CardSpeed:
    """Measures the device that a file is on. This takes some seconds.

    Raises InputMissing if the file is missing, too small or cannot be opened for direct reads; CardError if a read
    fails.
    """
    try:
        size = path.stat().st_size // PAGE * PAGE
        if size < SMALLEST_FILE:
            raise InputMissing(f"{path}: too small to measure a card with; name a file of a mebibyte or more")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise InputMissing(f"{path}: cannot be read past the page cache: {error.strerror}") from error
    buffer = mmap.mmap(-1, SEQUENTIAL_READ)  # on a page, as direct reads want it
    try:
        depth, sequential = _best_depth(fd, size)
        draw = random.Random(0)
        random_reads = {
            n: _rate(fd, buffer, n, [draw.randrange((size - n) // PAGE + 1) * PAGE for _ in range(RANDOM_READS)])
            for n in RANDOM_SIZES
        }
    except OSError as error:
        raise CardError(f"{path}: measuring the card: {error.strerror}") from error
    finally:
        os.close(fd)
    return CardSpeed(bandwidth=sequential * SEQUENTIAL_READ, random_reads=random_reads, when=time.time(), depth=depth)


def _best_depth(fd: int, size: int) -> tuple[int, float]:
    """(reads under way at once, reads a second) with which a file of `size` bytes is read fastest in order."""
    every = range(0, min(size, SEQUENTIAL_BYTES), SEQUENTIAL_READ)
    return _preferred([(depth, _rate_at(fd, [every[i::depth] for i in range(depth)])) for depth in DEPTHS])


def _rate_at(fd: int, parts: list[range]) -> float:
    """Large reads a second, if one thread reads each part's offsets and all read at once."""
    buffers = [mmap.mmap(-1, SEQUENTIAL_READ) for _ in parts]
    with ThreadPoolExecutor(len(parts)) as pool:
        started = time.perf_counter()
        done = sum(pool.map(lambda buffer, part: _read(fd, buffer, SEQUENTIAL_READ, part), buffers, parts))
        return done / max(1e-9, time.perf_counter() - started)


def _preferred(rates: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Of (reads under way, reads a second), the fastest. More of them must be faster by FASTER to be preferred."""
    best = rates[0]
    for depth, rate in rates[1:]:
        if rate > FASTER * best[1]:
            best = depth, rate
    return best


def _rate(fd: int, buffer: mmap.mmap, nbytes: int, offsets: list[int]) -> float:
    """Reads a second, from reads at `offsets`."""
    started = time.perf_counter()
    return _read(fd, buffer, nbytes, offsets) / max(1e-9, time.perf_counter() - started)


def _read(fd: int, buffer: mmap.mmap, nbytes: int, offsets: Sequence[int]) -> float:
    """Reads at `offsets`, until it has taken RANDOM_SECONDS; returns how many reads that were."""
    started, done = time.perf_counter(), 0.0
    with memoryview(buffer)[:nbytes] as view:
        for at in offsets:
            done += os.preadv(fd, [view], at) / nbytes
            if time.perf_counter() - started > RANDOM_SECONDS:
                break
    return done


def remember(path: Path, speed: CardSpeed, sysfs: Path = Path("/sys")) -> None:
    """Keeps a speed for the device that `path` is on. Raises CannotWrite."""
    _cards.put(device_key(path, sysfs), speed)


def remembered(path: Path, sysfs: Path = Path("/sys")) -> CardSpeed | None:
    """The speed that was measured on the device that `path` is on. None if it was not measured."""
    try:
        return _cards.get(device_key(path, sysfs))
    except OSError:
        return None


def device_key(path: Path, sysfs: Path = Path("/sys")) -> str:
    """A name that a card keeps when it is plugged in elsewhere, or its device number if it has no such name."""
    number = path.stat().st_dev
    numbers = f"{os.major(number)}:{os.minor(number)}"
    here = (sysfs / "dev/block" / numbers).resolve()
    for folder in (here, here.parent):  # a partition's disk is the folder above
        for name in ("device/cid", "device/serial", "device/wwid", "wwid", "serial"):
            try:
                text = (folder / name).read_text("ascii").strip()
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                return text
    return numbers
