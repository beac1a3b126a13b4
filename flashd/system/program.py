"""Programs that the service runs: each leads a session of its own, and ends with all that it started."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.05
"""How often a read looks whether it is still wanted."""


def goes_first(program: subprocess.Popen[bytes]) -> None:
    """If memory is short, the kernel ends this program, and not the daemon in whose group it is."""
    with suppress(OSError):
        Path(f"/proc/{program.pid}/oom_score_adj").write_text("1000")


def kill(program: subprocess.Popen[bytes]) -> None:
    """Ends a program that leads a session, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


def limit_memory(program: subprocess.Popen[bytes], nbytes: int) -> None:
    """From now on the program may have so many bytes of memory of its own; files that it maps do not count."""
    with suppress(ProcessLookupError):
        resource.prlimit(program.pid, resource.RLIMIT_DATA, (nbytes, nbytes))


def read_while(pipe: int, wanted: Callable[[], bool], most: int) -> bytes:
    """What comes through a pipe until it ends, `most` bytes have come, or it is not `wanted` any longer."""
    data = bytearray()
    while wanted() and len(data) < most:
        if select.select([pipe], [], [], LOOK_SECONDS)[0]:
            piece = os.read(pipe, min(4096, most - len(data)))
            if not piece:
                break
            data += piece
    return bytes(data)
