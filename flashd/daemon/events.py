"""Events that happen in other threads, brought into an asyncio loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Generic, TypeVar

E = TypeVar("E")


class Events(Generic[E]):
    """What is put in from any thread comes out in the loop that made this."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[E | None] = asyncio.Queue()
        self.over = False  # the daemon stops: nothing more will come

    def put(self, event: E | None) -> None:
        """None: there will be no more."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self, timeout: float) -> E | None:
        """The next event, or None if none came in `timeout` seconds."""
        try:
            event = await asyncio.wait_for(self._queue.get(), timeout)
        except TimeoutError:
            return None
        self.over = event is None
        return event
