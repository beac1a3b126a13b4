"""Runs in a child process what leaves memory behind, or what may ask for more time and memory than it is worth."""

from __future__ import annotations

import faulthandler
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
"""Held while a child is made that still shares this process's pins. The kernel gives a pin to nobody else until all
who have it let go: who takes one, or lets one go to take it in another way, holds this."""

PINS = ("anon_inode:gpio", "/dev/gpiochip")
"""What descriptors of pins lead to."""


@dataclass(frozen=True)
class Limits:
    """What a child may use: seconds of processor time, bytes of address space beyond what it starts with."""

    seconds: int
    memory: int

    def obey(self) -> None:
        """Puts the calling process under these limits, and in front of others where memory runs out."""
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + self.memory, held + self.memory))
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


class ChildDied(FlashdError):
    """The child ended without a result: killed, most likely for memory or time that it did not have."""


def in_child(action: Callable[[], Result], limits: Limits | None = None) -> Result:
    """What `action` returns, computed in a forked child.

    A process with threads may call it for what is plain Python: fork takes along only the calling thread, Python
    makes its own locks anew and glibc those of its allocator. What has threads of its own, such as onnxruntime, must
    not have started them before, or not be used.

    Raises the FlashdError that the action raised, or ChildDied.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the parent to answer
        gc.disable()  # what the parent has made is not for the child to undo
        _let_go_of_pins()
        faulthandler.disable()  # a death of this process is not one of the parent
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
    """Closes the descriptors alone: nothing is said to a driver, and the parent's pins stay as they are."""
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:  # noqa: PTH208
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(PINS):  # noqa: PTH115
                os.close(fd)
