"""The spool when the power is cut at any of its writes, when the disk is full, and when the clock jumps."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.daemon.spool import Spool
from flashd.errors import Busy, CannotWrite
from tests.daemon.fake_worker import Clerk, request
from tests.faults.layers import fuse
from tests.faults.power import cuts, read_log
from tests.waiting import wait

pytestmark = pytest.mark.slow


@pytest.mark.fuse
def test_a_power_cut_at_any_write_loses_no_accepted_job(tmp_path: Path) -> None:
    """Jobs are accepted, begun, put back and ended; then the power is cut before each change of the files."""
    accepted: dict[int, int] = {}  # job -> changes that had been made when it was
    ended: dict[int, int] = {}
    with fuse(tmp_path) as layer:
        spool = Spool(layer.folder / "spool.db", keep=50)
        opened_at = len(read_log(layer.log))
        jobs = Jobs(spool, most_waiting=20)
        for i in range(6):
            number = jobs.submit(request(f"question {i} " + "x" * 700)).id
            accepted[number] = len(read_log(layer.log))
            if i % 2:
                job = jobs.take(0)
                assert job is not None
                if i == 3:
                    jobs.put_back(job)
                    continue
                jobs.say(job, "an answer")
                jobs.finish(job, State.DONE, "stop")
                ended[job.id] = len(read_log(layer.log))
        changes = read_log(layer.log)
        spool.close()
        jobs.close()
    assert len(accepted) == 6 and len(ended) == 2 and opened_at < accepted[1] < len(changes)
    tried = 0
    for n, end, files in cuts({}, changes):
        folder = tmp_path / f"{n}-{end}"
        folder.mkdir()
        for name, data in files.items():
            (folder / name.lstrip("/")).write_bytes(data)
        again = Spool(folder / "spool.db", keep=50)
        found = {j.id: j for j in again.recent(100)}
        assert {number for number, at in accepted.items() if at <= n} <= set(found), (n, end)
        for number, at in ended.items():
            if at <= n:
                assert found[number].state is State.DONE and found[number].result.text == "an answer", (n, end)
        again.close()
        tried += 1
    assert tried >= 3 * len(accepted) * 2


@contextmanager
def full_tmpfs(folder: Path) -> Iterator[Callable[[bool], None]]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")

    def fill(full: bool) -> None:
        ballast = folder / "ballast"
        if not full:
            ballast.unlink()
            return
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full_by_limit(folder: Path) -> Iterator[Callable[[bool], None]]:
    """No file may grow: writes beyond what is there fail with EFBIG."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]) if full else limits)

    try:
        yield fill
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


Disk = Callable[[Path], AbstractContextManager[Callable[[bool], None]]]


@pytest.mark.parametrize("disk", [pytest.param(full_tmpfs, marks=pytest.mark.root), full_by_limit])
def test_a_full_disk_refuses_what_it_cannot_keep_and_goes_on(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    caplog.set_level(logging.ERROR)
    with disk(folder) as fill:
        spool = Spool(folder / "spool.db", keep=50)
        jobs = Jobs(spool, most_waiting=8)
        running, waiting = jobs.submit(request("a")), jobs.submit(request("b"))
        taken = jobs.take(0)
        assert taken is not None and taken.id == running.id
        jobs.say(taken, "answer")
        fill(True)
        with pytest.raises(CannotWrite, match=r"spool\.db"):
            for _ in range(200):  # what the log has room for is taken
                jobs.submit(request("c" * 2000))
                jobs.cancel(jobs.recent(1)[0].id)
        watch = jobs.watch(running.id)
        jobs.finish(taken, State.DONE, "stop")
        ends = [e.end for e in watch if e.end is not None]
        assert ends[0].result.text == "answer"  # who asked has the answer
        found = jobs.get(running.id)
        assert found is not None and found.state is State.DONE
        with pytest.raises(CannotWrite):
            jobs.take(0)
        assert jobs.waiting == 1
        fill(False)
        again = jobs.take(0)
        assert again is not None and again.id == waiting.id
        jobs.finish(again, State.DONE, "stop")
        states = {j.id: j.state for j in spool.recent(300)}
        assert states[running.id] is State.DONE and states[waiting.id] is State.DONE
        assert any("is written down later" in r.message for r in caplog.records)
        jobs.close()
        spool.close()


class Clock:
    """Stands in for the wall clock, which may be set to anything; the monotonic one is left alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.ahead)


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_that_jumps_changes_no_deadline_and_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    clock = Clock(monkeypatch)
    spool = Spool(tmp_path / "spool.db", keep=50)
    jobs = Jobs(spool, most_waiting=8)
    timely = jobs.submit(request(deadline=3600.0))
    jobs.submit(request(source="trigger:door", per_minute=1))
    clock.ahead = jump
    with pytest.raises(Busy, match="more than 1 times a minute"):
        jobs.submit(request(source="trigger:door", per_minute=1))
    late = jobs.submit(request(deadline=0.001))
    clock.ahead = -jump
    time.sleep(0.01)
    clerk = Clerk(jobs)
    wait(lambda: jobs.waiting == 0 and not jobs.running)
    clerk.close()
    states = {j.id: j.state for j in jobs.recent(10)}
    assert states[timely.id] is State.DONE and states[late.id] is State.EXPIRED
    jobs.close()
    spool.close()


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_that_jumped_while_the_power_was_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """A board without a battery starts in the past. A job with a deadline is answered or expires; none stays."""
    clock = Clock(monkeypatch)
    spool = Spool(tmp_path / "spool.db", keep=50)
    jobs = Jobs(spool, most_waiting=8)
    numbers = {jobs.submit(request()).id, jobs.submit(request(deadline=3600.0)).id}
    clock.ahead = jump
    after = Jobs(spool, most_waiting=8)
    clerk = Clerk(after)
    wait(lambda: after.waiting == 0 and not after.running)
    clerk.close()
    states = {j.id: j.state for j in after.recent(10)}
    assert set(states) == numbers and states[1] is State.DONE
    # its deadline has passed by the clock that there is, or counts from now
    assert states[2] is (State.DONE if jump < 0 else State.EXPIRED)
    after.close()
    spool.close()
