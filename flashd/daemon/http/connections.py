"""What one connection may hold and how long it may keep us waiting.

A connection owes us something while we wait for a request's head, for its client to read, or for the rest of a body
that is answered already. If that takes too long, it is dropped; if there are too many connections, the one that has
owed the longest makes room for the new one. If none owes us anything, one goes whose body has not come.
"""

from __future__ import annotations

import asyncio
import select
from contextlib import suppress
from typing import TYPE_CHECKING

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS, MOST_FROM_AFAR = 320, 96
"""In all, and of other machines, whose owners need no place on this one to open them."""

READ_BYTES = 8 << 10
"""Bytes of a head, and of a body, that a connection holds before the API asks for more."""

WRITE_BYTES = 32 << 10
"""Bytes of an answer that a connection holds before its client reads on."""

MOST_HEADERS = 64
"""Of a request. A short one takes fifty times its bytes, and many heads may come before one is answered."""

HEAD_SECONDS = 10.0
"""How long a client may take to send a request's head, or leave an open connection unused."""

READ_SECONDS = 10.0
"""How long a client may let an answer lie."""

REST_SECONDS, REST_BYTES = 10.0, 64 << 10
"""How long the rest of a body that is answered already is read and thrown away, and how much of it at once."""

LOOK_AGAIN_SECONDS, MOST_SECONDS = 1.0, 60.0
"""How soon after such a time we look again at a client whose bytes we have not read yet, and until when."""


class Connection(H11Protocol):
    """uvicorn's protocol with bounds, and with answers that arrive.

    Many clients send all of a body before they read. To close while some of it is unread resets the connection, and
    that takes the answer from them. So the rest is read first (RFC 9112, section 9.6).
    """

    _leaving = False  # answered, and closed as soon as the client closes
    _due: asyncio.TimerHandle | None = None
    _since = 0.0

    if TYPE_CHECKING:
        transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close, transport.close = transport.close, self._leave  # type: ignore[method-assign]
        self._read_at_once(READ_BYTES)
        transport.set_write_buffer_limits(high=WRITE_BYTES)
        self._owes(HEAD_SECONDS)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owes_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        rest = self._rest
        super().data_received(data)
        if rest and not self._rest and not self._leaving:
            self._read_at_once(READ_BYTES)
            self._owes(HEAD_SECONDS)
        if self.headers:
            del self.headers[MOST_HEADERS + 1 :]  # as many as are needed to refuse them
        if self._answering and not self.flow.write_paused:
            self._owes_nothing()
        if self._wants_body:
            self.flow.pause_reading()  # until the API asks for more of the body

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._leaving or self._rest:
            self._unset_keepalive_if_required()
            self._read_rest()
        elif not self._answering:
            self._owes(HEAD_SECONDS)

    def eof_received(self) -> None:
        self._leaving = True
        super().eof_received()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._owes(READ_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering:
            self._owes_nothing()
        elif self._leaving or self._rest:
            self._read_rest()
        else:
            self._owes(HEAD_SECONDS)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _wants_body(self) -> bool:
        return self._answering and bool(self.cycle.more_body)

    @property
    def _rest(self) -> bool:
        """Whether more may come of a request that is answered already."""
        return not self._answering and self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _read_rest(self) -> None:
        self._read_at_once(REST_BYTES)
        self._owes(REST_SECONDS)

    def _leave(self) -> None:
        """In place of the transport's `close`: reads what is left, and closes when the client does."""
        if self._leaving or not self._rest or self.transport.is_closing():
            self._close()
            return
        self._leaving = True
        with suppress(OSError):  # the client is gone; it is seen when we read
            self.transport.write_eof()
        self.flow.resume_reading()
        self._read_rest()

    def _read_at_once(self, size: int) -> None:
        self.transport.max_size = size  # type: ignore[attr-defined]  # asyncio reads 256 KiB at once

    def _owes(self, seconds: float) -> None:
        self._owes_nothing()
        self._since = self.loop.time()
        self._due = self.loop.call_later(seconds, self._give_up)

    def _owes_nothing(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        """The time is over. What lies unread came in time: it is we who are slow."""
        late = self.loop.time() - self._since > MOST_SECONDS
        if late or self.flow.write_paused or self.flow.read_paused or not self._unread():
            self._drop()
        else:
            self._due = self.loop.call_later(LOOK_AGAIN_SECONDS, self._give_up)

    def _unread(self) -> bool:
        look = select.poll()
        look.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(look.poll(0))

    def _drop(self) -> None:
        self._owes_nothing()
        self.connections.discard(self)
        self.transport.abort()

    @property
    def _from_afar(self) -> bool:
        return self.server is not None and self.server[1] is not None and self.server[0] != "127.0.0.1"

    def _make_room(self) -> None:
        here = [c for c in self.connections if isinstance(c, Connection)]
        afar = [c for c in here if c._from_afar]
        for all_of_them, most in ((afar, MOST_FROM_AFAR), (here, MOST_CONNECTIONS)):
            if len(all_of_them) > most:
                others = [c for c in all_of_them if c is not self]
                # those whose body we wait for owe us that; a new client goes only if all others wait for us
                owing = [c for c in others if c._due is not None] or [c for c in others if c._wants_body] or [self]
                min(owing, key=lambda c: c._since)._drop()
                return
