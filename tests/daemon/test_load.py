"""The service under more clients than it has places for: it lives, it says that it does, and it keeps its budget.

FLASHD_LOAD=60 for a minute of it; by default some seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from flashd.daemon.job import Request, Result, State, Turn
from flashd.daemon.spool import Spool
from flashd.system.memory import MIB
from tests.daemon.running import PATIENCE, Running

SECONDS = float(os.environ.get("FLASHD_LOAD", "6"))
HEALTH_SECONDS = 0.2
"""What /health may take, in 99 of 100 cases, on a machine that does nothing else. See `slower`."""

CLIENTS, LARGE, GREEDY, SLOW, IDLE = 200, 10, 10, 20, 40
CGROUPS = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]


def slower(pid: int) -> float:
    """How many times as long things took for a process that had to wait for processors, as the kernel counted it."""
    ran = waited = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        run, wait, _ = map(int, (task / "schedstat").read_text().split())
        ran, waited = ran + run, waited + wait
    return 1.0 + waited / max(ran, 1)


def smallest(daemon: Running) -> int:
    """MiB of the smallest budget that the service accepts."""
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("memory: 600M", "memory: 16M"))
    module = ["-m", "tests.daemon.appliance_process", str(daemon.config)]
    refused = subprocess.run([sys.executable, *module], capture_output=True, text=True, check=False).stderr
    daemon.config.write_text(text)
    (mebibytes,) = re.findall(r"the smallest that works is (\d+)M", refused)
    return int(mebibytes)


def fill(path: Path) -> None:
    """A spool with large jobs, as an older flashd kept them."""
    with closing(Spool(path, keep=1000)) as spool:
        for _ in range(40):
            job = spool.add(Request(turns=tuple(Turn("user", "word " * 50_000) for _ in range(4)), source="api"))
            job.state, job.ended, job.result = State.DONE, time.time(), Result(text="x" * 1000, finish="stop")
            spool.end(job)


@contextmanager
def group(pid: int, limit: int) -> Iterator[None]:
    """A memory control group round the process, if this is root and the kernel lets it have one."""
    for root, name in zip(CGROUPS, ("memory.max", "memory.limit_in_bytes"), strict=True):
        folder = root / f"flashd-load-{pid}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if not (folder / name).exists():
            folder.rmdir()
            continue
        (folder / name).write_text(str(limit))
        (folder / "cgroup.procs").write_text(str(pid))
        try:
            yield
        finally:
            with suppress(OSError):  # it may have ended
                (root / "cgroup.procs").write_text(str(pid))
            folder.rmdir()
        return
    yield


WANTED = {"small 200": 50, "large 400": 10, "list 200": 5, "greedy 200": 5, "heads 431": 5}
"""Answers that there must be of each kind, and no others."""


class Load:
    """Clients of all kinds at once, for so long, and until enough was answered."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)
        self.replies: Counter[str] = Counter()
        self.health: list[float] = []

    async def run(self) -> None:
        small = {"messages": [{"role": "user", "content": "the thesis"}], "max_tokens": 2}
        large = {"messages": [{"role": "user", "content": "word " * 50_000}] * 4}
        greedy = small | {
            "n": 2, "logprobs": True, "top_logprobs": 20, "max_tokens": 97, "stop": ["x" * 256] * 16,
            "logit_bias": {str(token): 1 for token in range(200)},
        }  # fmt: skip
        kinds = [
            *[self._asks("small", "POST /v1/chat/completions", json.dumps(small).encode()) for _ in range(CLIENTS)],
            *[self._asks("large", "POST /v1/chat/completions", json.dumps(large).encode()) for _ in range(LARGE)],
            *[self._asks("list", "GET /api/jobs?most=1000", b"") for _ in range(4)],
            *[self._asks("greedy", "POST /v1/chat/completions", json.dumps(greedy).encode()) for _ in range(GREEDY)],
            *[self._asks("heads", "GET /api/jobs", b"", b"a:\r\n" * 3900, 1.0) for _ in range(GREEDY)],
            *[self._stalls("GET /api/jobs/7") for _ in range(SLOW)],
            *[self._stalls("") for _ in range(IDLE)],
            self._looks(),
        ]
        tasks = [asyncio.ensure_future(kind) for kind in kinds]
        begun = time.monotonic()
        while time.monotonic() - begun < SECONDS or any(self.replies[kind] < n for kind, n in WANTED.items()):
            assert time.monotonic() - begun < SECONDS + PATIENCE, self.replies
            await asyncio.sleep(0.1)
            for task in tasks:
                assert not task.done() or task.result()  # which raises why it ended
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _asks(self, kind: str, what: str, body: bytes, head: bytes = b"", pause: float = 0.0) -> None:
        """Asks again and again. With a `pause`, others come through in between."""
        while True:
            await asyncio.sleep(pause)
            status = await self._request(what, body, head)
            self.replies[f"{kind} {status}"] += 1

    async def _looks(self) -> None:
        while True:
            begun = time.monotonic()
            assert await self._request("GET /health", b"") == "200"
            self.health.append(time.monotonic() - begun)
            await asyncio.sleep(0.02)

    async def _stalls(self, what: str) -> None:
        """Says what it wants, if anything, and never reads."""
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_unix_connection(self._socket, limit=1)
                with closing(writer):
                    if what:
                        writer.write(f"{what} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    await asyncio.sleep(5.0)

    async def _request(self, what: str, body: bytes, more: bytes = b"") -> str:
        """The status of an answer; "dropped" if there is none."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket)
            with closing(writer):
                head = f"{what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode()[:-2] + more + b"\r\n" + body)
                said = await reader.read(-1)
        except OSError:
            return "dropped"
        return said[9:12].decode() or "dropped"


@pytest.mark.slow
def test_many_clients_neither_kill_it_nor_lock_each_other_out(tiny_bundle: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_bundle, most=32) as daemon:
        limit = smallest(daemon) + 2
        daemon.config.write_text(daemon.config.read_text().replace("memory: 600M", f"memory: {limit}M"))
        fill(tmp_path / "spool.db")
        daemon.start()
        assert daemon.process is not None
        with group(daemon.process.pid, limit * MIB):
            load = Load(daemon.socket)
            asyncio.run(load.run())
            assert daemon.process.poll() is None, daemon.log.read_text()[-2000:]
            factor = slower(daemon.process.pid) * slower(os.getpid())  # it answers, and we take the time
            (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())
            with daemon.http() as http:
                assert http.get("/health").json() == {"status": "ok"}
            assert daemon.stop() == 0
    health = sorted(load.health)
    print(
        f"{load.replies}, peak {int(peak) / 1024:.1f} of {limit} MiB, /health {health[len(health) * 99 // 100]:.3f} s"
        f" on a machine that took {factor:.1f} times as long"
    )
    # readers that do not read hold up other readers, and nobody else; few may ask for logprobs at once
    refused = {"list 503", "greedy 429"}
    assert set(WANTED) <= set(load.replies) <= set(WANTED) | refused, load.replies
    assert int(peak) << 10 <= limit * MIB
    assert health[len(health) * 99 // 100] < HEALTH_SECONDS * factor
    assert "Traceback" not in daemon.log.read_text()
