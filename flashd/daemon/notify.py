"""What systemd is told: ready, status, and that work goes on. Silent where systemd did not start the daemon."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress

from flashd.system.printable import PlainFormatter, is_journal


class Notifier:
    """sd_notify(3): each message is a datagram to the socket that systemd names.

    The watchdog is fed by `alive`, which those call who did something: computed layers, read something, wrote part of
    a snapshot, looked at the queue. No timer feeds it, so a hang is noticed and a slow card is not taken for one.
    """

    def __init__(self) -> None:
        name = os.environ.get("NOTIFY_SOCKET", "")
        self._to = f"\0{name[1:]}" if name.startswith("@") else name  # "@" stands for an abstract socket's null byte
        self._interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        self._fed = 0.0
        self._status = ""

    def ready(self) -> None:
        """A prompt can be answered now."""
        self._notify("READY=1")

    def reloading(self) -> None:
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._notify("STOPPING=1\nSTATUS=stopping")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._notify(f"STATUS={text}")

    def alive(self) -> None:
        """Something was done. Costs nothing when called often."""
        now = time.monotonic()
        if self._interval and now - self._fed > self._interval / 4:
            self._fed = now
            self._notify("WATCHDOG=1")

    def _notify(self, message: str) -> None:
        if not self._to:
            return
        # a manager that went away is no reason to answer nobody
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.sendto(message.encode(), self._to)


def log_to_journal() -> None:
    """Sends log records to the journal with their fields where systemd reads our output, to stderr elsewhere."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("flashd: %(message)s"))
    if is_journal(2):
        try:
            from systemd.journal import JournalHandler

            handler = JournalHandler(SYSLOG_IDENTIFIER="flashd")
            handler.setFormatter(PlainFormatter())
        except ImportError:
            pass  # plain lines on stderr reach the journal too, without fields
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
