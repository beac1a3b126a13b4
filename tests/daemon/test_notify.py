"""What systemd is told over its socket, and what the journal gets."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashd.daemon.notify import Notifier

PROGRAM = """
import os, logging, socket
journal = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
journal.connect("/run/systemd/journal/stdout")
journal.sendall(b"flashd\\n\\n6\\n1\\n0\\n0\\n0\\n")  # sd_journal_stream_fd(3): the header of a stream
os.dup2(journal.fileno(), 2)
here = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{here.st_dev}:{here.st_ino}"
from flashd.daemon.notify import log_to_journal
log_to_journal()
logging.getLogger("flashd").info("job 7 done", extra={"JOB_ID": 7, "TRIGGER": "TAG", "TOKENS": 5, "CARD_BYTES": 9})
"""


def _journal_listens() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        return stream.connect_ex("/run/systemd/journal/stdout") == 0 and shutil.which("journalctl") is not None


@pytest.fixture(params=["in the file system", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The socket that systemd names, of either kind."""
    name = str(tmp_path / "notify") if request.param == "in the file system" else f"@flashd-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name.replace("@", "\0"))
        listening.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
        yield listening


def test_systemd_is_told_with_no_compiled_package(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "systemd", None)
    notifier = Notifier()
    for tell in (notifier.ready, lambda: notifier.status("idle"), notifier.alive, notifier.stopping):
        tell()
    told = [systemd.recv(100).decode() for _ in range(4)]
    assert told == ["READY=1", "STATUS=idle", "WATCHDOG=1", "STOPPING=1\nSTATUS=stopping"]
    notifier.reloading()
    assert systemd.recv(100).decode().startswith("RELOADING=1\nMONOTONIC_USEC=")


def test_a_manager_that_went_away_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Notifier().ready()


@pytest.mark.systemd
@pytest.mark.skipif(not _journal_listens(), reason="needs a journal")
def test_the_journal_gets_a_job_s_fields() -> None:
    pytest.importorskip("systemd")
    tag = f"trigger:{uuid.uuid4()}"
    subprocess.run([sys.executable, "-c", PROGRAM.replace("TAG", tag)], check=True)
    found = ""
    until = time.monotonic() + 10
    while not found and time.monotonic() < until:
        time.sleep(0.2)
        read = ["journalctl", f"TRIGGER={tag}", "-o", "json", "--no-pager"]
        found = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    entry = json.loads(found)
    assert {k: entry[k] for k in ("JOB_ID", "TOKENS", "CARD_BYTES", "SYSLOG_IDENTIFIER", "MESSAGE")} == {
        "JOB_ID": "7", "TOKENS": "5", "CARD_BYTES": "9", "SYSLOG_IDENTIFIER": "flashd", "MESSAGE": "job 7 done",
    }  # fmt: skip


def test_the_log_says_nothing_that_a_terminal_would_obey() -> None:
    program = "import logging; from flashd.daemon.notify import log_to_journal; log_to_journal();"
    hostile = r"'a\x1b]0;owned\x07\x9b2J\rb\nflashd: a line of its own'"
    raised = f"try:\n raise ValueError({hostile})\nexcept ValueError: logging.exception('%s', {hostile})"
    said = subprocess.run(
        [sys.executable, "-c", f"{program}\n{raised}"], stderr=subprocess.PIPE, check=True
    ).stderr.decode()
    assert not set(said) & {"\x1b", "\x07", "\x9b", "\r"}
    assert said.startswith("flashd: a]0;owned2Jb flashd: a line of its own\nTraceback")
