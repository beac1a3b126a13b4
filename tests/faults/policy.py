"""What goes wrong with a card, decided in one place for the two layers that bring it about (see layers)."""

from __future__ import annotations

import errno
import time

import msgspec


class Flip(msgspec.Struct, frozen=True):
    """Bit 0 of a byte of the file is wrong in the first `times` reads of it."""

    offset: int
    times: int = 1 << 30


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with the card now."""

    card: int = 0  # which card is in: what was opened on an earlier one never answers again
    gone_after: int | None = None  # reads after which the card is gone
    error: int = errno.EIO  # what it answers then
    most: int | None = None  # bytes that a read gives at most
    delay: float = 0.0  # seconds more that a read takes
    flips: list[Flip] = []
    bad: int | None = None  # a byte that no read gives


class Policy:
    """Applies faults to reads, counting from when they were set."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self._reads = 0
        self._flipped = [0] * len(faults.flips)

    def open(self) -> int:
        """The card on which something is opened now. Raises OSError."""
        self._check(self.faults.card)
        return self.faults.card

    def length(self, wanted: int) -> int:
        return min(wanted, self.faults.most or wanted)

    def read(self, card: int, offset: int, data: bytes) -> bytes:
        """What a read gives of the right `data`. Raises OSError."""
        time.sleep(self.faults.delay)
        self._check(card)
        self._reads += 1
        if self.faults.bad is not None and offset <= self.faults.bad < offset + len(data):
            raise OSError(errno.EIO, "a bad sector")
        out = bytearray(data)
        for i, flip in enumerate(self.faults.flips):
            if offset <= flip.offset < offset + len(out) and self._flipped[i] < flip.times:
                self._flipped[i] += 1
                out[flip.offset - offset] ^= 1
        return bytes(out)

    def _check(self, card: int) -> None:
        gone = self.faults.gone_after is not None and self._reads >= self.faults.gone_after
        if gone or card != self.faults.card:
            raise OSError(self.faults.error, "the card is gone")
