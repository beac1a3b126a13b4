"""What the queue takes: how long, how many at once, and how often."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence

from flashd.daemon.job import HELD_BYTES, MAX_TEXT, Request, weight
from flashd.errors import BadField, Busy, NoRoom, UsageError

MINUTE = 60.0
"""Seconds that are looked back."""


class Rates:
    """What each source did in the last minute. Its caller locks it."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}

    def full(self, source: str, most: int | None) -> bool:
        """Whether a source has done something `most` times in the last minute already. None: it may do any number."""
        if most is None:
            return False
        times = self._recent.setdefault(source, deque())
        while times and times[0] < time.monotonic() - MINUTE:
            times.popleft()
        return len(times) >= most

    def check(self, request: Request) -> None:
        """Raises Busy if the source of a request has asked too often."""
        if self.full(request.source, request.per_minute):
            raise Busy(f"{request.source} asks more than {request.per_minute} times a minute")

    def note(self, source: str, most: int | None) -> None:
        """A source does something that it may do `most` times a minute."""
        if most is not None:
            self._recent.setdefault(source, deque()).append(time.monotonic())


def check_texts(request: Request) -> None:
    """Raises UsageError if a request asks nothing, or too long a text."""
    if not any(turn.content.strip() for turn in request.turns if turn.role == "user"):
        raise UsageError("the prompt is empty; say what to answer")
    if (longest := max(len(turn.content) for turn in request.turns)) > MAX_TEXT:
        raise UsageError(f"a message of {longest} characters; allowed is {MAX_TEXT}")


def check_room(requests: Sequence[Request], most: int, waiting: int, held: Collection[Request]) -> None:
    """Raises NoRoom unless there is room for all of some requests now, UsageError if there never is.

    `most` jobs may wait, and `waiting` do; `held` are the requests that are in RAM.
    """
    if len(requests) > most:
        many = f"{len(requests)} answers at once"
        raise BadField("n", f"{many}; the queue has room for {most}, see spool.most_waiting")
    if waiting + len(requests) > most:
        raise NoRoom(f"no room for another job: {waiting} waiting; try again later")
    if sum(weight(each) for each in requests) > HELD_BYTES:
        raise BadField("n", f"{len(requests)} answers to a prompt as long as this at once; ask for fewer")
    if sum(weight(each) for each in (*held, *requests)) > HELD_BYTES:
        raise NoRoom(f"no room for this prompt beside {len(held)} others; try again later")
