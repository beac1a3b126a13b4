"""Requests that hold memory wait for a place, in the order in which they came. /health and all else that is small
never waits.

What clients may make the service hold is CLIENTS bytes together; the memory plan counts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flashd.daemon.connections import MOST_CONNECTIONS, WRITE_BYTES
from flashd.daemon.job import WAITING_BYTES

MOST_WAITING = 320
"""Requests that wait for a place. Fewer than there are connections, so that /health always has one."""

MOST_ASKING = 32
"""Prompts that are read, wait in the queue, or are answered."""

MOST_READING = 2
"""Requests that read jobs of the spool, each of which may be large."""

MAX_BODY = 1 << 20
"""Bytes of a request's body."""

SMALL_BODY = 64 << 10
"""Bytes of a body that is read beside others; larger ones are read one at a time."""

CONNECTION_BYTES = 16 << 10
"""What a connection takes beside what it sends and receives."""

COPIES = 4
"""Of a large body: its bytes, the message in it (a character may take four bytes), and the prompt made of that."""

CLIENTS = (
    MOST_CONNECTIONS * CONNECTION_BYTES
    + MOST_ASKING * (SMALL_BODY + WRITE_BYTES)
    + COPIES * MAX_BODY
    + WAITING_BYTES
    + MOST_READING * 2 * MAX_BODY
)
"""Bytes that all clients together may make the service hold."""


class Admission:
    """The places of an application.

    Args:
        app: what is behind.
        asking: prompts that may be under way at once.
    """

    def __init__(self, app: ASGIApp, asking: int) -> None:
        self._app = app
        self._asking, self._reading = asyncio.Semaphore(min(asking, MOST_ASKING)), asyncio.Semaphore(MOST_READING)
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        places = self._places(scope)
        if places is None:
            await self._app(scope, receive, send)
            return
        if places.locked() and self._waiting >= MOST_WAITING:
            await _full(scope, receive, send)
            return
        async with self._turn(places):
            await self._app(scope, receive, send)

    def _places(self, scope: Scope) -> asyncio.Semaphore | None:
        if scope["type"] != "http":
            return None
        if scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            return self._asking
        return self._reading if scope["method"] == "GET" and scope["path"].startswith("/api/jobs") else None

    @asynccontextmanager
    async def _turn(self, places: asyncio.Semaphore) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            places.release()


_full = JSONResponse(
    {
        "error": {
            "message": f"{MOST_WAITING} requests wait already; try again later",
            "type": "server_error",
            "code": 503,
        }
    },
    503,
    {"Retry-After": "10"},
)
