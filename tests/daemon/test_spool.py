"""The spool file: what is no spool is refused, what cannot be written is said."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flashd.daemon import spool
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.daemon.spool import Spool
from flashd.errors import CannotWrite, DataError, InputMissing
from flashd.system.child import Limits, in_child
from tests.daemon.fake_worker import request

LITTLE = Limits(seconds=20, memory=64 << 20)


def test_what_is_no_spool_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = b"not a database, but long enough to look like one" * 100
    (tmp_path / "spool.db").write_bytes(text)
    with closing(Spool(tmp_path / "spool.db", keep=5)) as begun:
        assert begun.add(request("hello")).id == 1
    assert (tmp_path / "spool.db.damaged").read_bytes() == text
    assert "it is kept as spool.db.damaged, and a new one is begun" in caplog.text


def test_a_spool_that_rots_is_put_aside_and_all_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with closing(Spool(path, keep=50)) as writer:
        jobs = Jobs(writer, 50)
        waiting = [jobs.submit(request(f"{i}: " + "long " * 400)) for i in range(20)]
        writer._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (path.stat().st_size - 4096))
        writer._connection.execute("PRAGMA shrink_memory")
        with pytest.raises(CannotWrite, match=r"spool\.db: .*a new one is begun, try again"):
            jobs.submit(request("one more"))
        assert jobs.submit(request("one more")).id == len(waiting) + 1
        # who asked before gets an answer, and it is kept
        for job in waiting:
            assert jobs.take(0) is job and spool.read_one(path, job.id) is not None
            jobs.say(job, "yes")
            with closing(jobs.watch(job.id)) as watch:
                jobs.finish(job, State.DONE, "stop")
                assert [event.kind for event in watch] == ["text", "ended"]
        jobs.close()
    assert [job.id for job in spool.read_latest(path, 50)] == list(range(21, 0, -1))
    assert (found := spool.read_one(path, 7)) is not None
    assert found.result.text == "yes" and found.request == waiting[6].request
    assert path.with_name("spool.db.damaged").exists()


def test_a_newer_spool_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "spool.db") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(DataError, match="version 9"):
        Spool(tmp_path / "spool.db", keep=5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CannotWrite, match=r"spool\.db"):
        Spool(tmp_path / "spool.db", keep=5)


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="/proc/none"):
        Spool(Path("/proc/none/spool.db"), keep=5)


def test_another_process_may_read(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no spool"):
        spool.read_latest(tmp_path / "spool.db", 3)
    writer = Spool(tmp_path / "spool.db", keep=5)
    for text in ("a", "b"):
        writer.add(request(text))
    found = reversed(spool.read_latest(tmp_path / "spool.db", 3))
    assert [j.request.turns[0].content for j in found] == ["a", "b"]
    writer.close()


def test_who_may_not_read_is_told_why(tmp_path: Path) -> None:
    """And who may, but not write, reads what a daemon that is stopped has left."""
    path = tmp_path / "spool.db"
    writer = Spool(path, keep=5)
    writer.add(request("a"))
    writer.close()
    path.chmod(0o444)
    tmp_path.chmod(0o555)

    def as_nobody() -> int:
        if os.getuid() == 0:
            os.setuid(65534)
        return len(spool.read_latest(path, 3))

    try:
        for folder in tmp_path.parents[:3]:  # pytest-xdist has one more
            folder.chmod(0o755)
        assert in_child(as_nobody, LITTLE) == 1
        path.chmod(0)
        with pytest.raises(InputMissing, match=r"only members of group flashd may use it; sudo usermod "):
            in_child(as_nobody, LITTLE)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("rot", [b"{", b'{"turns":"\xff"}'])
def test_a_job_that_rotted_is_left_out_and_the_others_are_there(
    tmp_path: Path, rot: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "spool.db", keep=5)
    jobs = [spool.add(request(text)) for text in "abc"]
    spool._connection.execute("UPDATE jobs SET request = ? WHERE id = ?", (rot, jobs[1].id))
    assert [job.id for job in spool.waiting()] == [jobs[0].id, jobs[2].id]
    assert f"job {jobs[1].id} is damaged" in caplog.text
    spool.close()


def test_each_write_is_synced(tmp_path: Path) -> None:
    """A power cut loses nothing that `add` has returned for: SQLite must sync its log at every commit."""
    writer = Spool(tmp_path / "spool.db", keep=5)
    assert writer._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert writer._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    writer.close()
