"""How the last run of the daemon ended: whether something in the process itself killed it.

Python's faulthandler writes down a fatal signal (a crash, a lost watchdog) in a file beside the spool. `flashd safe`,
which systemd runs after each stop, adds a death for want of memory, of which the process knows nothing. A signal from
a person and a lost supply leave the file empty.
"""

from __future__ import annotations

import faulthandler
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from flashd.errors import CannotWrite
from flashd.system.plain_file import open_plain

log = logging.getLogger(__name__)

LONGEST = 64 << 10
"""Characters of what is told of a death."""

KILLED_BY_ITSELF = ("oom-kill", "watchdog", "core-dump")
"""systemd.exec(5): what $SERVICE_RESULT says if the cause is in the process."""


def death_file(spool: Path) -> Path:
    return spool.with_name(f"{spool.name}.death")


@dataclass(frozen=True)
class LastRun:
    """How the last run ended."""

    died: bool  # of something in the process itself
    _file: TextIO

    def noted(self) -> None:
        """Forgets it: what follows from it is in the spool. Until then a start that fails leaves it to the next."""
        self._file.truncate(0)


@contextmanager
def watched(spool: Path) -> Iterator[LastRun]:
    """Writes down a crash from here on; gives how the last run ended.

    Raises CannotWrite if the file cannot be written.
    """
    path = death_file(spool)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(
            open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+", encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise CannotWrite(f"{path}: {error.strerror}") from error
    with file:
        file.seek(0)
        told = file.read(LONGEST).strip()
        for line in told.splitlines():
            log.error("the last run died: %s", line)
        faulthandler.enable(file)
        try:
            yield LastRun(bool(told), file)
        finally:
            faulthandler.enable()  # from here on to standard error


def note_death(spool: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Writes down what systemd says of a death, if it is in the process and not written down yet.

    systemd calls this after the service's end.
    """
    path = death_file(spool)
    result = environment.get("SERVICE_RESULT", "")
    if result not in KILLED_BY_ITSELF:
        return
    try:
        with os.fdopen(open_plain(path, os.O_RDWR | os.O_APPEND), "a", encoding="utf-8") as file:
            if not os.fstat(file.fileno()).st_size:
                file.write(f"systemd says: {result}\n")
    except FileNotFoundError:
        return
    except OSError as error:  # such as a full disk, which must not keep pins on
        log.error("%s: %s", path, error.strerror)
