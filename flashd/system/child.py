"""Runs a function in a child process: one that leaves memory behind, or may take too much time or memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import threading
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


@dataclass(frozen=True)
class Limits:
    """What a child may use."""

    seconds: int  # of processor time
    memory: int  # bytes of address space beyond those that it starts with

    def obey(self) -> None:
        """Puts the calling process under these limits. If memory runs out, the kernel kills it before others."""
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + self.memory, held + self.memory))
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


class ChildDied(FlashdError):
    """The child ended without a result. Most likely it was killed because memory or time ran out."""


def in_child(action: Callable[[], Result], limits: Limits | None = None) -> Result:
    """Calls `action` in a forked child and returns its result.

    A process with threads may do this if `action` is plain Python: fork copies only the calling thread, and Python
    and glibc's allocator make their locks anew. `action` must not use a library that has started threads of its own,
    such as onnxruntime.

    Raises the FlashdError that the action raised, or ChildDied.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the parent to answer
        gc.disable()  # the child must not finalise the parent's objects
        _let_go_of_pins()
        send.send(None)
        try:
            if limits:
                limits.obey()
            send.send((action(), None))
        except FlashdError as error:
            send.send((None, error))

    child = context.Process(target=run)
    try:
        with FORKING:
            child.start()
            send.close()
            receive.recv()
        result, error = receive.recv()
    except EOFError:
        child.join()
        killed = "; is there enough memory?" if limits or (child.exitcode or 0) < 0 else ""
        raise ChildDied(f"a child process died (exit {child.exitcode}){killed}") from None
    finally:
        receive.close()
    child.join()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _let_go_of_pins() -> None:
    """Closes the child's descriptors of pins and nothing else, so that the parent's pins stay as they are."""
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:  # noqa: PTH208
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(PINS):  # noqa: PTH115
                os.close(fd)
