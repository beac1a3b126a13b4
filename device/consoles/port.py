"""A serial port, through pyserial: opened again when it went away, written no faster than its line."""

from __future__ import annotations

import errno
import logging
import os
import select
import termios
import threading
import time
from collections.abc import Callable

import serial

from flashd.config.settings import Serial

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""How often a port that is gone is tried again."""

GONE = (serial.SerialException, OSError, termios.error)
"""What pyserial lets through when an adapter is pulled."""

BITS_A_BYTE = 10

MOST_BEHIND = 64 << 10
"""Bytes kept for a line whose other end holds it up; what is to be written beyond is dropped."""


class Port:
    """An open port, which no other program that asks for a lock has. Raises one of GONE when it goes away."""

    def __init__(self, settings: Serial) -> None:
        self._line = serial.serial_for_url(
            settings.port, baudrate=settings.baud, timeout=0, write_timeout=0,
            rtscts=settings.flow == "rtscts", xonxoff=settings.flow == "xonxoff", exclusive=True,
        )  # fmt: skip
        self._settings = settings
        self._said: set[str] = set()
        self._rate = settings.baud / BITS_A_BYTE
        self._out = bytearray()
        self._free_at = time.monotonic()

    def close(self) -> None:
        if self._settings.flow != "none":
            # what an end that is not ready does not take would hold up the close for half a minute
            self._line.reset_output_buffer()
        self._line.close()

    def read(self, timeout: float) -> bytes:
        """What has come, waiting up to `timeout` seconds for a first byte; meanwhile what is due is written."""
        until = time.monotonic() + timeout
        while True:
            self._pump()
            data = bytes(self._line.read(4096))
            if b"\0" in data:
                self.note("a break, or noise, on the line")
            now = time.monotonic()
            if data or now >= until:
                return data
            time.sleep(min(0.01, until - now))

    def write(self, text: str) -> None:
        """Takes a text; it goes out as fast as the line carries it, while `read` is called."""
        if len(self._out) > MOST_BEHIND:
            self.note("the other end takes nothing; what is for it is dropped")
            return
        self._out += text.encode("utf-8", "replace")

    def discard(self) -> None:
        """Forgets what has not gone out yet."""
        self._out.clear()

    @property
    def behind(self) -> bool:
        return bool(self._out)

    def _pump(self) -> None:
        now = time.monotonic()
        if not self._out or now < self._free_at or not select.select([], [self._line], [], 0)[1]:
            return
        # a fiftieth of a second's worth: so much, and no more, is on its way when Ctrl-C comes
        written = self._line.write(bytes(self._out[: max(1, int(self._rate / 50))])) or 0
        del self._out[:written]
        self._free_at = now + written / self._rate

    def note(self, what: str) -> None:
        """Says in the journal what the line was put through, once while it is open."""
        if what not in self._said:
            self._said.add(what)
            log.warning("serial %s: %s", self._settings.name, what)


class SerialLine:
    """Keeps a session running on a port for as long as the daemon lives.

    Args:
        settings: the port.
        session: talks over an open port until told to stop; raises one of GONE when the port goes away.
    """

    def __init__(self, settings: Serial, session: Callable[[Port, threading.Event], None]) -> None:
        self._settings, self._session = settings, session
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"serial {settings.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(5)

    def _run(self) -> None:
        said_missing = False
        while not self._stopping.is_set():
            try:
                port = Port(self._settings)
            except (*GONE, ValueError) as error:
                if not said_missing:
                    log.warning("serial %s: %s; waiting for it", self._settings.name, _words(error))
                said_missing = True
                self._stopping.wait(RETRY_SECONDS)
                continue
            said_missing = False
            log.info("serial %s: open on %s", self._settings.name, self._settings.port)
            gone: BaseException | None = None
            try:
                self._session(port, self._stopping)
            except GONE as error:
                gone = error
            except Exception as error:
                # whatever was typed: a console that nobody can use any more would look healthy from outside
                log.exception("serial %s: an error in flashd", self._settings.name)
                gone = error
            finally:
                # at once: as long as it is open, an adapter that is put back gets another name
                _close(port)
            if gone is not None:
                log.warning("serial %s: gone (%s); waiting for it", self._settings.name, _words(gone))
                self._stopping.wait(RETRY_SECONDS)


def _close(port: Port) -> None:
    try:
        port.close()
    except GONE as error:
        log.debug("closing: %s", error)


def _words(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EAGAIN:
        return "another program has it"
    return os.strerror(number) if number else str(error)
