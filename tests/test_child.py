"""What runs in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from flashd.system import child

PARENT = """
import signal, sys, time
from flashd.child import in_child

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it

def work():
    print("working", flush=True)
    time.sleep(60)

try:
    in_child(work)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_while_a_child_works_is_the_parent_s_to_answer() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"working\n"
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    _, said = parent.communicate(timeout=30)
    assert (parent.returncode, said) == (130, b"")


def links() -> list[str]:
    """What this process's descriptors lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
    return found


def test_a_child_keeps_no_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent could not take one in another way for as long as a child has it too: the kernel says busy."""
    monkeypatch.setattr(child, "PINS", ("/memfd:gpio",))
    pin, bundle = os.memfd_create("gpio-line"), os.memfd_create("bundle")
    try:
        assert {"/memfd:gpio-line (deleted)", "/memfd:bundle (deleted)"} <= set(links())
        there = set(child.in_child(links))
        assert "/memfd:gpio-line (deleted)" not in there and "/memfd:bundle (deleted)" in there
        os.fstat(pin)
    finally:
        os.close(pin)
        os.close(bundle)


def test_no_child_is_made_while_a_pin_is_taken() -> None:
    made = threading.Event()
    other = threading.Thread(target=lambda: made.set() if child.in_child(os.getpid) else None)
    with child.FORKING:
        other.start()
        assert not made.wait(0.3)
    assert made.wait(60)
    other.join()
