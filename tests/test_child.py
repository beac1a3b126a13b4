"""What runs in a child process."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import popen_fork
from pathlib import Path

import pytest

from flashd.errors import DataError
from flashd.system import child
from tests.waiting import wait

LITTLE = child.Limits(seconds=20, memory=64 << 20)

PARENT = """
import signal, sys, time
from flashd.system.child import Limits, in_child

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it

def work():
    print("working", flush=True)
    time.sleep(60)

try:
    in_child(work, Limits(60, 1 << 28))
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
        there = set(child.in_child(links, LITTLE))
        assert "/memfd:gpio-line (deleted)" not in there and "/memfd:bundle (deleted)" in there
        os.fstat(pin)
    finally:
        os.close(pin)
        os.close(bundle)


def test_no_child_is_made_while_a_pin_is_taken() -> None:
    made = threading.Event()
    other = threading.Thread(target=lambda: made.set() if child.in_child(os.getpid, LITTLE) else None)
    with child.FORKING:
        other.start()
        assert not made.wait(0.3)
    assert made.wait(60)
    other.join()


def gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked how yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    script = PARENT.replace('print("working", flush=True)', "import os; print(os.getpid(), flush=True)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.communicate(timeout=30)
    wait(lambda: gone(pid))


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    """It may end between the fork and the wish to be told of it."""
    made = multiprocessing.get_context("fork").Process(target=child._die_with, args=(1,))
    made.start()
    made.join(30)
    assert made.exitcode == os.EX_UNAVAILABLE


def takes_memory() -> int:
    """Up to 2 GiB. The first of it may be what this process has freed but not given back: no limit knows it."""
    return len([b"x" * (8 << 20) for _ in range(256)])


def takes_time() -> None:
    while True:
        pass


@pytest.fixture(scope="module", autouse=True)
def holes() -> Iterator[None]:
    """What a long run of tests leaves: 480 MiB that were freed, but not given back, since something lies behind."""
    glibc_keeps_such_pieces = bytearray(31 << 20)
    del glibc_keeps_such_pieces
    *pieces, behind = [bytearray(30 << 20) for _ in range(17)]
    del pieces
    yield
    del behind


@pytest.mark.parametrize("action", [takes_memory, takes_time])
def test_a_child_that_takes_too_much_is_ended(action: Callable[[], object]) -> None:
    with pytest.raises(child.ChildDied, match="it may use 1 s or 64 MiB"):
        child.in_child(action, child.Limits(seconds=1, memory=64 << 20))
    assert child.in_child(os.getpid, LITTLE) != os.getpid()


def test_a_mapped_file_is_not_what_a_child_writes(tmp_path: Path) -> None:
    """A model may be larger than its memory."""
    with (tmp_path / "model").open("w+b") as file:
        file.truncate(1 << 30)

        def mapped() -> int:
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
                return len(whole)

        assert child.in_child(mapped, LITTLE) == 1 << 30


def test_a_child_is_silent_unless_it_may_speak(capfd: pytest.CaptureFixture[str]) -> None:
    """A library that fails writes a backtrace of its own."""

    def speak() -> None:
        os.write(2, b"panicked\n")

    child.in_child(speak, LITTLE)
    child.in_child(speak, child.Limits(20, 64 << 20, says=True))
    assert capfd.readouterr().err == "panicked\n"


def test_a_child_s_child_is_within_the_limits_of_both() -> None:
    def grandchild() -> int:
        return child.in_child(takes_memory, child.Limits(seconds=20, memory=4 << 30))

    with pytest.raises(child.ChildDied, match="20 s or 4096 MiB"):
        child.in_child(grandchild, LITTLE)


def test_an_error_that_is_kept_keeps_no_pipe() -> None:
    def fail() -> None:
        raise DataError("no")

    before = sorted(links())
    with pytest.raises(DataError) as refused:
        child.in_child(fail, LITTLE)
    with pytest.raises(child.ChildDied) as died:
        child.in_child(lambda: os._exit(3), LITTLE)
    assert "exit 3" in str(died.value) and refused.tb and sorted(links()) == before


def test_a_child_whose_end_another_thread_finds_first_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a child waits for all that have ended. The code of this one is noted a little later."""
    real, late = popen_fork.Popen.poll, list[threading.Timer]()

    def poll(self: popen_fork.Popen, flag: int = os.WNOHANG) -> int | None:
        code = real(self, flag)
        if flag != 0:
            return code
        self.returncode = None
        late.append(threading.Timer(0.05, setattr, (self, "returncode", code)))
        late[-1].start()
        return None

    monkeypatch.setattr(popen_fork.Popen, "poll", poll)
    assert child.in_child(lambda: 7, LITTLE) == 7 and late
    late[0].join()
