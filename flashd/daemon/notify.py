"""What systemd is told: ready, status, and that work goes on. Silent where systemd did not start the daemon."""

from __future__ import annotations

import logging
import os
import time

from flashd.errors import InputMissing


class Notifier:
    """sd_notify(3) through the systemd-python package.

    The watchdog is fed by `alive`, which those call who did something: a layer computed, a read returned, the
    queue looked at. No timer feeds it, so a hang is noticed and a slow card is not taken for one.
    """

    def __init__(self) -> None:
        self._send = None
        self._interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        self._fed = 0.0
        self._status = ""
        if os.environ.get("NOTIFY_SOCKET"):
            try:
                from systemd import daemon
            except ImportError as error:
                raise InputMissing("running under systemd needs: pip install 'flashd[systemd]'") from error
            self._send = daemon.notify

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
        if self._send is not None:
            self._send(message)


def log_to_journal() -> None:
    """Sends log records to the journal with their fields where systemd reads our output, to stderr elsewhere."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("flashd: %(message)s"))
    if _stderr_is_the_journal():
        try:
            from systemd.journal import JournalHandler

            handler = JournalHandler(SYSLOG_IDENTIFIER="flashd")
        except ImportError:
            pass  # plain lines on stderr reach the journal too, without fields
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def _stderr_is_the_journal() -> bool:
    """systemd.exec(5): JOURNAL_STREAM names the device and inode of the stream, if it was not redirected since."""
    here = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{here.st_dev}:{here.st_ino}"
