"""Runs a function in a child process: one that leaves memory behind, or may take too much time or memory."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flashd.errors import FlashdError

Result = TypeVar("Result")

FORKING = threading.RLock()
"""A new child shares this process's pins for a moment, and the kernel gives a pin to nobody else until every process
that has it lets go. So this lock is held while a child is made, and by code that takes or releases a pin."""

PINS = ("anon_inode:gpio", "/dev/gpiochip")
"""The beginnings of what descriptors of pins lead to."""


PR_SET_PDEATHSIG = 1
"""What prctl(2) calls a child's wish to be sent a signal when the thread that made it ends."""


OUT_OF_MEMORY = 3
"""The exit code of a child that had too little memory to say so."""


@dataclass(frozen=True)
class Limits:
    """What a child may use: seconds of processor time, bytes of memory that it writes beyond what it starts with.

    It starts with what its parent has freed but not given back to the system. No limit counts that.
    """

    seconds: int
    memory: int
    says: bool = False  # whether it may write to the terminal; libraries that fail write much there

    def __str__(self) -> str:
        return f"{self.seconds} s or {self.memory >> 20} MiB"

    def obey(self) -> None:
        """Puts the calling process under these limits, and in front of others where memory runs out."""
        # what is written, and not what is mapped: a model's file may be many times as large as the memory
        held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        _lower(resource.RLIMIT_DATA, held + self.memory)
        _lower(resource.RLIMIT_CPU, self.seconds)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if not self.says:
            with Path(os.devnull).open("wb") as silent:
                os.dup2(silent.fileno(), 2)


def _lower(kind: int, to: int) -> None:
    """A process may have a limit of its own already, which it may not raise."""
    hard = resource.getrlimit(kind)[1]
    most = to if hard == resource.RLIM_INFINITY else min(to, hard)
    resource.setrlimit(kind, (most, most))


class ChildDied(FlashdError):
    """The child ended without a result. Most likely it was killed because memory or time ran out."""


def in_child(action: Callable[[], Result], limits: Limits) -> Result:
    """What `action` returns, computed in a forked child that has limits and ends when its parent does.

    A process with threads may do this if `action` is plain Python: fork copies only the calling thread, and Python
    and glibc's allocator make their locks anew. `action` must not use a library that has started threads of its own,
    such as onnxruntime. What it logs is logged here, when it has ended.

    Raises the FlashdError that the action raised, or ChildDied.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    parent = os.getpid()

    def run() -> None:
        _die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the parent to answer
        gc.disable()  # the child must not finalise the parent's objects
        _let_go_of_pins()
        faulthandler.disable()  # a death of this process is not one of the parent
        noted = _noted_logs()
        send.send(None)
        try:
            limits.obey()
            send.send((action(), None, noted))
        except FlashdError as error:
            send.send((None, error, noted))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)

    child = context.Process(target=run)
    try:
        with FORKING:
            child.start()
            send.close()
            receive.recv()
        result, error, noted = receive.recv()
    except EOFError:
        raise ChildDied(f"a child process died (exit {_ended(child)}); it may use {limits}") from None
    finally:
        receive.close()
    _ended(child)
    for record in noted:
        logging.getLogger(record.name).handle(record)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _ended(child: multiprocessing.process.BaseProcess) -> int | None:
    """Waits for a child's end and returns its exit code. Closes its pipes: an error that is kept would keep them."""
    child.join()
    # multiprocessing looks for ended children whenever one starts. If another thread has found this one, it may not
    # have noted so yet, and then join knows of no end
    while (code := child.exitcode) is None:
        time.sleep(0.001)
    child.close()
    return code


def _noted_logs() -> list[logging.LogRecord]:
    """The list to which all log records go from now on, ready to be sent to another process."""
    noted: list[logging.LogRecord] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            record.msg, record.args, record.exc_info = record.getMessage(), None, None
            noted.append(record)

    logging.getLogger().handlers[:] = [Noting()]
    return noted


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, even if that was killed."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we had asked
        os._exit(os.EX_UNAVAILABLE)


def _let_go_of_pins() -> None:
    """Closes the child's descriptors of pins and nothing else, so that the parent's pins stay as they are."""
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:  # noqa: PTH208
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(PINS):  # noqa: PTH115
                os.close(fd)
