"""What systemd is told over its socket, and what the journal gets."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashd.bundle.reader import Bundle
from flashd.config.settings import Answering
from flashd.daemon import notify
from flashd.daemon.job import Draw, Job, State
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.spool import Spool
from flashd.daemon.worker import Worker
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.engine.forward import resident
from flashd.engine.model.kv_cache import KvCache
from tests.daemon.fake_worker import request
from tests.tiny import LAYERS
from tests.waiting import wait

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


class SlowBoard:
    """A board whose layers take 25 s each, as the notifier's clock has it; and what systemd hears meanwhile."""

    LAYER_SECONDS = 25.0

    def __init__(self, systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self._fed = self.longest = 0.0  # seconds; `longest` without a sign of life
        self.layers = 0  # computed since the start
        self.after_layer: Callable[[], object] = lambda: None
        self._systemd = systemd
        systemd.setblocking(False)
        take_in = KvCache.take_in

        def computed(cache: KvCache, i: int, past: int, tokens: int) -> None:
            take_in(cache, i, past, tokens)
            self._layer()

        monkeypatch.setattr(notify, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(KvCache, "take_in", computed)

    def _layer(self) -> None:
        with suppress(BlockingIOError):
            while True:
                if self._systemd.recv(4096) == b"WATCHDOG=1":
                    self._fed = self.now
        self.layers += 1
        self.now += self.LAYER_SECONDS
        self.longest = max(self.longest, self.now - self._fed)
        self.after_layer()


def test_a_slow_pass_of_a_model_in_ram_feeds_the_watchdog(
    systemd: socket.socket, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each session of some layers does. So a pass may take longer than the watchdog waits; it may break off there."""
    monkeypatch.setattr(resident, "layers_together", lambda header: 1)  # as in a larger model
    spool = Spool(tmp_path / "spool.db", keep=10)
    jobs = Jobs(spool, most_waiting=4)

    def ended(text: str) -> Job:
        job = jobs.submit(request(text, draw=Draw(seed=5, temperature=2.0)))
        wait(lambda: job.state.ended, 60)
        return job

    with Bundle(tiny_bundle) as bundle, Engine(bundle, Budget(None, 256, 2)) as engine:
        assert engine.plan.resident
        slow = SlowBoard(systemd, monkeypatch)
        worker = Worker(jobs, engine, Prompts(bundle), None, Answering(max_tokens=9), Notifier())
        worker.start()
        try:
            first = ended("Hello?")
            assert first.state is State.DONE and slow.layers == 9 * LAYERS
            assert LAYERS * slow.LAYER_SECONDS > 60 > slow.longest
            slow.after_layer = lambda: jobs.cancel(2)
            assert ended("Is that the sea?").state is State.CANCELLED and slow.layers == 9 * LAYERS + 1
            slow.after_layer = lambda: None
            assert ended("Hello?").result.text == first.result.text != ""
        finally:
            worker.stop()
    jobs.close()
    spool.close()


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
