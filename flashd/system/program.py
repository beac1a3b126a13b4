"""Programs that the service runs: each leads a session of its own, and ends with all that it started."""

from __future__ import annotations

import errno
import os
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.05
"""How often a read looks whether it is still wanted."""

PIECE = 4096
"""Bytes that are read at once."""

PIPE = 64 << 10
"""Bytes that a pipe holds."""


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


def with_memory(command: Sequence[str], nbytes: int) -> list[str]:
    """A command that runs `command` under such a limit from its first moment on. Raises OSError if it is not there.

    A shell sets the limit: to set it from outside comes too late if the program is fast.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    return ["sh", "-c", 'ulimit -d "$0" && exec "$@"', str(nbytes >> 10), *command]


def pieces(pipe: int, wanted: Callable[[], bool]) -> Iterator[bytes]:
    """What comes through a pipe, as it comes, until it ends or is not `wanted` any longer."""
    while wanted():
        if select.select([pipe], [], [], LOOK_SECONDS)[0]:
            piece = os.read(pipe, PIECE)
            if not piece:
                return
            yield piece


def read_while(pipe: int, wanted: Callable[[], bool], most: int) -> bytes:
    """What comes through a pipe until it ends, `most` bytes have come, or it is not `wanted` any longer."""
    data = bytearray()
    for piece in pieces(pipe, wanted):
        data += piece
        if len(data) >= most:
            break
    return bytes(data[:most])


def read_to_end(program: subprocess.Popen[bytes], wanted: Callable[[], bool], most: int) -> bytes:
    """What a program prints, up to `most` bytes. If there are fewer it has ended, or is not `wanted` any longer."""
    assert program.stdout is not None
    printed = read_while(program.stdout.fileno(), wanted, most)
    while len(printed) < most and program.poll() is None and wanted():
        with suppress(subprocess.TimeoutExpired):
            program.wait(LOOK_SECONDS)
    return printed


def read_now(pipe: int) -> bytes:
    """What is in a pipe already."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, PIPE)
    except BlockingIOError:
        return b""


def last_line(text: bytes) -> str:
    """The last line that is not empty: where a program says why it failed."""
    lines = text.decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
