"""A watch on jobs: the events of one job, or of all, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from flashd.daemon.job import Event, Job

Sink = Callable[[Event | None], None]
"""Takes events from whatever thread they happen in, and None when there will be no more. It must not wait."""


class Watch:
    """The events of one job, or of all, as they come. Close it."""

    def __init__(self, stop: Callable[[Watch], None], job: int | None, sink: Sink | None = None) -> None:
        self.job = job
        self.holds: Job | None = None  # what it has of a job that is not forgotten before it is closed
        self._queue: SimpleQueue[Event | None] = SimpleQueue()
        self._stop = stop
        self.put = sink or self._queue.put

    def next(self, timeout: float | None = None) -> Event | None:
        """The next event, or None if none came in `timeout` seconds or the watch was closed."""
        try:
            return self._queue.get(timeout=timeout) if timeout != 0 else self._queue.get_nowait()
        except Empty:
            return None

    def __iter__(self) -> Iterator[Event]:
        """Events up to the job's end."""
        while (event := self.next()) is not None:
            yield event
            if event.kind == "ended" and self.job is not None:
                return

    def close(self) -> None:
        self._stop(self)
        self.put(None)
