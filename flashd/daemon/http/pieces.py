"""Answers in pieces: each goes when the client has read those before, so that one who does not read holds little."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

from starlette.responses import Response, StreamingResponse

PIECE_BYTES = 8 << 10


def in_pieces(data: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a body of JSON."""
    sized = {**(headers or {}), "Content-Length": str(len(data))}
    return StreamingResponse(_cut(data), media_type="application/json", headers=sized)


async def _cut(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), PIECE_BYTES):
        yield data[at : at + PIECE_BYTES]


async def lines_in_pieces(lines: AsyncGenerator[str]) -> AsyncIterator[bytes]:
    """The bytes of some lines, of which one may be long."""
    async with aclosing(lines):
        async for line in lines:
            async for piece in _cut(line.encode()):
                yield piece
