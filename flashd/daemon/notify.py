"""What systemd is told: ready, status, and that work goes on. Silent where systemd did not start the daemon."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress

from flashd.errors import InputMissing


class Notifier:
    """sd_notify(3) through the cysystemd package, whose wheels bring libsystemd along.

    The watchdog is fed by `alive`, which those call who did something: a layer computed, a read returned, the
    queue looked at. No timer feeds it, so a hang is noticed and a slow card is not taken for one.
    """

    def __init__(self) -> None:
        self._interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        self._fed = 0.0
        self._status = ""
        self._systemd = None
        if os.environ.get("NOTIFY_SOCKET"):
            try:
                from cysystemd import daemon
            except ImportError as error:
                raise InputMissing("running under systemd needs: pip install 'flashd[systemd]'") from error
            self._systemd = daemon

    def ready(self) -> None:
        """A prompt can be answered now."""
        self._notify("READY")

    def reloading(self) -> None:
        self._notify("RELOADING")

    def stopping(self) -> None:
        self._notify("STOPPING")
        self.status("stopping")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._notify("STATUS", text)

    def alive(self) -> None:
        """Something was done. Costs nothing when called often."""
        now = time.monotonic()
        if self._interval and now - self._fed > self._interval / 4:
            self._fed = now
            self._notify("WATCHDOG")

    def _notify(self, name: str, value: str | None = None) -> None:
        if self._systemd is not None:
            self._systemd.notify(self._systemd.Notification[name], value)


def log_to_journal() -> None:
    """Sends log records to the journal with their fields where systemd reads our output, to stderr elsewhere."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("flashd: %(message)s"))
    if _stderr_is_the_journal():
        with suppress(ImportError):  # plain lines on stderr reach the journal too, without fields
            handler = _Journal()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


class _Journal(logging.Handler):
    """A record with those of its fields whose names the journal's are like: JOB_ID, not lineno."""

    def __init__(self) -> None:
        super().__init__()
        from cysystemd import journal

        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: value for name, value in vars(record).items() if name.isupper()}
        priority = self._journal.JournaldLogHandler.LEVELS[record.levelno]
        text = self.format(record)
        self._journal.send(message=text, priority=priority, syslog_identifier="flashd", logger=record.name, **fields)


def _stderr_is_the_journal() -> bool:
    """systemd.exec(5): JOURNAL_STREAM names the device and inode of the stream, if it was not redirected since."""
    here = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{here.st_dev}:{here.st_ino}"
