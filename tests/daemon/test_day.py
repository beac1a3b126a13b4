"""A scripted day with the default model: jobs from everywhere, cancels, reloads, and a kill -9 in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx
import serial

from device.demo import Cable
from flashd.daemon import spool
from flashd.daemon.job import HEAD
from tests.daemon.running import PATIENCE, Running

JOBS = 90
MOST_WAITING = 24
UNFINISHED = ("queued", "running")
DAY = """
serial: [{{name: board, port: {port}, mode: machine}}]
sensors:
  - {{kind: mcp3008, name: soil, channel: 0, high: 100, unit: "%"}}
  - {{kind: ds18b20, name: room, timeout: 0.2}}
triggers:
  - {{kind: button, name: one, pin: 4, bounce: 0, prompt: "Say one word about soil of {{{{ sensors.soil }}}}."}}
  - {{kind: button, name: two, pin: 5, bounce: 0, priority: 7, barge_in: true, prompt: "{{{{ sensors.room }}}}?"}}
  - {{kind: button, name: three, pin: 6, bounce: 0, prompt: "Water or wait?", choose: [water, wait]}}
  - {{kind: schedule, name: soil, every: 2, prompt: "{{{{ sensors.soil }}}}, water?", choose: [water, wait]}}
  - {{kind: schedule, name: room, every: 3, prompt: "The room has {{{{ sensors.room }}}}."}}
outputs:
  - {{kind: hook, event: done, command: [sh, -c, "cat > $(mktemp {told}/XXXXXXXX)"], timeout: 120}}
"""


class Script:
    """What happens in the day: who asks, and what was accepted."""

    def __init__(self, daemon: Running, cable: Cable) -> None:
        self.daemon, self.random = daemon, random.Random(2026)
        self.accepted: set[int] = set()
        self.cancelled: set[int] = set()
        self._clients: list[threading.Thread] = []
        self._served = threading.Event()
        self._line = serial.Serial(cable.theirs, timeout=0.1)
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read_serial, daemon=True)
        self._reader.start()

    def close(self, http: httpx.Client) -> None:
        """Evening: nothing more is asked, and what was asked is waited for."""
        http.post("/api/mute/on")
        for client in self._clients:
            client.join()
        # lines are served in order: when this is answered, those before it were accepted
        self._line.write(b'{"id": "evening", "status": true}\n')
        assert self._served.wait(PATIENCE)
        until = time.monotonic() + 5 * PATIENCE  # the queue is full, and the machine may be slow
        while (status := http.get("/api/status").json())["waiting"] or status["running"]:
            assert time.monotonic() < until, status
            time.sleep(0.1)
        self._stop.set()
        self._reader.join()
        self._line.close()

    def act(self, http: httpx.Client) -> None:
        """One thing that somebody does."""
        what = self.random.choice(["api", "api", "serial", "press", "press", "cancel"])
        if what == "api":
            self._ask_api()
        elif what == "serial":
            prompt = f"Number {self.random.randrange(1000)}?"
            self._line.write(json.dumps({"prompt": prompt, "max_tokens": 3}).encode() + b"\n")
        elif what == "press":
            http.post(f"/demo/press/{self.random.choice([4, 5, 6])}")
        else:
            waiting = [j["id"] for j in http.get("/api/jobs?most=8").json() if j["state"] in UNFINISHED]
            number = self.random.choice(waiting) if waiting else 0
            if number and http.request("DELETE", f"/api/jobs/{number}").json()["cancelled"]:
                self.cancelled.add(number)

    def _ask_api(self) -> None:
        """A client that asks and goes on reading in a thread of its own, as people do."""
        body = {"messages": [{"role": "user", "content": f"Say {self.random.randrange(1000)}."}], "max_tokens": 3}

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError), self.daemon.http() as mine:
                reply = mine.post("/v1/chat/completions", json=body)
                if "X-Job" in reply.headers:
                    self.accepted.add(int(reply.headers["X-Job"]))

        self._clients.append(threading.Thread(target=ask, daemon=True))
        self._clients[-1].start()

    def _read_serial(self) -> None:
        while not self._stop.is_set():
            line = self._line.readline()
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event["event"] == "accepted":
                    self.accepted.add(event["job"])
                elif event["event"] == "status":
                    self._served.set()


def all_jobs(http: httpx.Client) -> list[dict[str, Any]]:
    """The heads of all jobs, newest first, a page at a time."""
    found: list[dict[str, Any]] = http.get("/api/jobs?most=100").json()
    while found and found[-1]["id"] > 1 and (page := http.get(f"/api/jobs?most=100&before={found[-1]['id']}").json()):
        found += page
    return found


def test_a_day(packed: dict[str, Path], tmp_path: Path) -> None:
    cable, told = Cable(), tmp_path / "told"
    told.mkdir()
    settings = DAY.format(port=cable.ours, told=told)
    with Running(tmp_path, packed["int4"], settings, most=MOST_WAITING) as daemon, daemon.http() as http:
        daemon.start()
        script = Script(daemon, cable)
        killed = reloads = 0
        before: dict[int, dict[str, Any]] = {}
        while (latest := (all_jobs(http) or [{"id": 0}])[0]["id"]) < JOBS:
            script.act(http)
            time.sleep(0.02)
            if latest >= 30 * reloads + 15:  # one look may find several more jobs than the one before
                reloads += 1
                os.kill(daemon.process.pid, signal.SIGHUP)  # type: ignore[union-attr]
            if latest > JOBS // 2 and not killed:
                killed += 1
                check_memory(http)
                before = {j["id"]: j for j in all_jobs(http) if j["state"] not in UNFINISHED}
                daemon.stop(signal.SIGKILL)
                daemon.start()
                script.cancelled &= set(before)  # that one was to be cancelled is forgotten while it is not yet
            waiting = http.get("/api/status").json()["waiting"]
            assert waiting <= MOST_WAITING + 1  # one that was interrupted may wait beside them
        script.close(http)
        check_memory(http)
        assert daemon.descriptors() < 120
        assert daemon.stop() == 0
    cable.close()
    jobs = {j.id: j for j in spool.read_latest(tmp_path / "spool.db", 10_000)}
    # every accepted job is answered once or reported as cancelled, none twice, none lost
    assert script.accepted <= set(jobs)
    assert set(jobs) == set(range(1, max(jobs) + 1)) and len(jobs) >= JOBS
    assert killed == 1 and reloads >= 3
    assert {str(j.state) for j in jobs.values()} == {"done", "cancelled"}
    assert script.cancelled <= {j.id for j in jobs.values() if j.state == "cancelled"}
    for job in jobs.values():
        if job.state == "done":
            assert job.result.text and job.result.finish in ("stop", "length"), job
            if job.request.choose:
                assert job.result.text in job.request.choose
    # what had ended before the kill was left alone, and nobody was told of an answer twice
    assert all((jobs[n].ended, jobs[n].result.text[:HEAD]) == (j["ended"], j["answer"]) for n, j in before.items())
    answers = Counter(json.loads(path.read_text())["id"] for path in told.iterdir())
    assert set(answers.values()) == {1} and set(answers) <= {j.id for j in jobs.values() if j.state == "done"}
    assert {j.request.source for j in jobs.values()} >= {
        "api", "serial:board", "trigger:one", "trigger:two", "trigger:three", "trigger:soil", "trigger:room"
    }  # fmt: skip


def check_memory(http: httpx.Client) -> None:
    """The most that the daemon ever held is within its budget."""
    figures = dict(line.split(" ") for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert 0 < float(figures["flashd_peak_bytes"]) <= float(figures["flashd_memory_budget_bytes"]) == 600 << 20
