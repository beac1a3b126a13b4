"""Requests that hold memory wait for a place, in the order in which they came. /health and all else that is small
never waits.

What clients may make the service hold is CLIENTS bytes together; the memory plan counts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashd.daemon.http.connections import MOST_CONNECTIONS, WRITE_BYTES
from flashd.daemon.job import HELD_BYTES
from flashd.daemon.openai.refusals import body_of

MOST_WAITING, MOST_WAITING_READERS = 224, 32
"""Requests that wait for a place. Fewer than there are connections, so that /health always has one."""

MOST_ASKING = 32
"""Prompts that are read, wait in the queue, or are answered."""

MOST_READING = 2
"""Requests that read jobs of the spool, each of which may be large."""

MOST_SCORED, SCORED_BYTES = 2, 1 << 20
"""Requests that ask for logprobs, and what the probabilities of each take."""

HEEDED = b"host", b"origin", b"content-length", b"transfer-encoding"
"""Headers that are read here. Others are not kept while a request waits."""

MAX_BODY = 1 << 20
"""Bytes of a request's body."""

SMALL_BODY = 64 << 10
"""Bytes of a body that is read beside others; larger ones are read one at a time."""

CONNECTION_BYTES = 32 << 10
"""What a connection takes whose request waits, its head and its address included; measured."""

COPIES = 4
"""Of a large body, or of a job that the spool has: its bytes, the texts in it, and what is made of those."""

CLIENTS = (
    MOST_CONNECTIONS * CONNECTION_BYTES
    + MOST_ASKING * (SMALL_BODY + WRITE_BYTES)
    + COPIES * MAX_BODY
    + HELD_BYTES
    + MOST_SCORED * SCORED_BYTES
    + MOST_READING * COPIES * MAX_BODY
)
"""Bytes that all clients together may make the service hold."""


class Places:
    """So many at once; others wait their turn, the first one first."""

    def __init__(self, count: int, most_waiting: int) -> None:
        self._free, self._most, self._waiting = asyncio.Semaphore(count), most_waiting, 0

    @property
    def full(self) -> bool:
        return self._waiting >= self._most

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()


class Admission:
    """Gives each request of an application the place that it needs.

    Args:
        app: what is behind.
        asking: prompts that may be under way at once.
    """

    def __init__(self, app: ASGIApp, asking: int) -> None:
        self._app = app
        self._asking = Places(min(asking, MOST_ASKING), MOST_WAITING)
        self._reading = Places(MOST_READING, MOST_WAITING_READERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._admit(scope, receive, noted)
        except asyncio.CancelledError:  # the service stops
            if not begun:
                await _stopping(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        places = self._places(scope)
        if scope["type"] == "http":
            scope["headers"][:] = [each for each in scope["headers"] if each[0] in HEEDED]
        if places is None:
            await self._app(scope, receive, send)
        elif places.full:
            await _full(scope, receive, send)
        else:
            async with places.turn():
                await self._app(scope, receive, send)

    def _places(self, scope: Scope) -> Places | None:
        if scope["type"] != "http":
            return None
        if scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            return self._asking
        return self._reading if scope["method"] == "GET" and scope["path"].startswith("/api/jobs") else None


def _refusal(message: str) -> JSONResponse:
    return JSONResponse(body_of(503, message), 503, {"Retry-After": "10"})


_full = _refusal("too many requests wait already; try again later")
_stopping = _refusal("flashd is stopping; try again when it runs")
