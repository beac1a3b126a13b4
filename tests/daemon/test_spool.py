"""The spool file: what is no spool is refused, what cannot be written is said."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from flashd.child import in_child
from flashd.daemon import spool
from flashd.daemon.spool import Spool
from flashd.errors import CannotWrite, DataError, InputMissing
from tests.daemon.clerk import request


def test_what_is_no_spool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spool.db").write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(DataError, match=r"spool\.db: .*move it away"):
        Spool(tmp_path / "spool.db", keep=5)


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
        for folder in tmp_path.parents[:2]:
            folder.chmod(0o755)
        assert in_child(as_nobody) == 1
        path.chmod(0)
        with pytest.raises(InputMissing, match=r"only for the group flashd; sudo usermod -aG flashd \$USER"):
            in_child(as_nobody)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("rot", [b"{", b'{"turns":"\xff"}'])
def test_a_job_that_rotted_is_left_out_and_the_others_are_there(
    tmp_path: Path, rot: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "spool.db", keep=5)
    jobs = [spool.add(request(text)) for text in "abc"]
    spool._db.execute("UPDATE jobs SET request = ? WHERE id = ?", (rot, jobs[1].id))
    assert [job.id for job in spool.waiting()] == [jobs[0].id, jobs[2].id]
    assert f"job {jobs[1].id} is damaged" in caplog.text
    spool.close()


def test_each_write_is_synced(tmp_path: Path) -> None:
    """A power cut loses nothing that `add` has returned for: SQLite must sync its log at every commit."""
    writer = Spool(tmp_path / "spool.db", keep=5)
    assert writer._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert writer._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    writer.close()
