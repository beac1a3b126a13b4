"""A daemon at work for a while: what it holds afterwards is what it held soon after its start.

FLASHD_SOAK=86400 for a day of it; by default some seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.daemon.running import Running

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FLASHD_SOAK", "6"))
WARM_UP = 60  # things done before anything is compared
GROWTH = 12 << 20  # bytes: an allocator's holes, which a leak of a job's size passes in some thousand jobs
TRIGGERS = """
triggers:
  - {kind: button, name: front, pin: 4, bounce: 0, prompt: "the thesis"}
  - {kind: manual, name: plants, prompt: "the", choose: ["he", "th"]}
"""


def threads(daemon: Running) -> int:
    assert daemon.process is not None
    return len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))


def act(daemon: Running, http: httpx.Client, dice: random.Random) -> None:
    """One thing that somebody does, sense or nonsense."""
    what = dice.randrange(8)
    body = {"messages": [{"role": "user", "content": "the thesis " * dice.randrange(1, 4)}], "max_tokens": 6}
    if what < 3:
        assert http.post("/v1/chat/completions", json=body).status_code in (200, 429)
    elif what == 3:
        http.post("/v1/chat/completions", content=bytes(dice.randrange(256) for _ in range(200)))
    elif what == 4:
        http.post("/api/triggers/plants")
    elif what == 5:
        http.post("/demo/press/4")
    elif what == 6:
        with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": 60}) as reply:
            next(reply.iter_lines())  # and goes away
    elif dice.randrange(10) == 0:
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
    else:
        http.get("/metrics")


def test_memory_descriptors_and_threads_stay_flat(tiny_bundle: Path, tmp_path: Path) -> None:
    dice, done = random.Random(6), 0
    with Running(tmp_path, tiny_bundle, TRIGGERS) as daemon:
        daemon.start(watchdog=60)
        with daemon.http() as http:
            until = time.monotonic() + SECONDS
            before = (0, 0, 0)
            while done < 2 * WARM_UP or time.monotonic() < until:
                with contextlib.suppress(StopIteration):
                    act(daemon, http, dice)
                done += 1
                if done == WARM_UP:
                    before = (daemon.rss(), daemon.descriptors(), threads(daemon))
            while http.get("/api/status").json()["waiting"]:
                time.sleep(0.05)
            rss, fds, running = daemon.rss(), daemon.descriptors(), threads(daemon)
        assert daemon.stop() == 0
    assert rss - before[0] < GROWTH, f"{done} things done: {before[0] >> 20} -> {rss >> 20} MiB"
    assert fds <= before[1] + 4 and running <= before[2] + 4, (before, fds, running)
