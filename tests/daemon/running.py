"""A daemon in a process of its own, as systemd would run it, with a notify socket that tests read."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

from flashd.daemon.job import State

BASE = """
model: {model}
memory: 600M
context: 512
answer: {{max_tokens: 8, temperature: 0}}
api: {{socket: {folder}/flashd.sock}}
spool: {{path: {folder}/spool.db, most_waiting: {most}}}
"""


PATIENCE = 180.0
"""Seconds after which a daemon that says nothing is given up; a busy machine may need most of them."""


class Running:
    """A daemon over a folder; start it, kill it, start it again on the same spool."""

    def __init__(self, folder: Path, model: Path, more: str = "", most: int = 64) -> None:
        self.folder = folder
        self.config = folder / "flashd.yaml"
        self.config.write_text(BASE.format(folder=folder, model=model, most=most) + more)
        self.socket = folder / "flashd.sock"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify"))
        self.notify.settimeout(0.2)
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = False
        self.program = [sys.executable, "-m", "tests.daemon.appliance_process"]
        self.deaf_from = ""
        """While set: systemd reads no further than a message with this word, and the daemon soon waits for it."""
        self._reader = threading.Thread(target=self._read_notices, name="systemd", daemon=True)
        self._reader.start()
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, watchdog: float = 0.0, until: str = "READY=1") -> list[str]:
        """Starts it and waits for READY, or what else it should tell; what it told systemd up to then."""
        env = os.environ | {
            "NOTIFY_SOCKET": str(self.folder / "notify"), "XDG_CACHE_HOME": str(self.folder / "cache"),
        }  # fmt: skip
        if watchdog:
            env["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        self._told = queue.SimpleQueue()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*self.program, str(self.config)], env=env, stderr=log)
        return self.told_until(until)

    def told_until(self, word: str) -> list[str]:
        """What systemd is told up to and with a message that holds `word`."""
        told: list[str] = []
        until = time.monotonic() + PATIENCE
        while not told or word not in told[-1]:
            try:
                told.append(self._told.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{word} was not told; log: {self.log.read_text()[-2000:]}") from None
        return told

    def wait_for_silence(self, seconds: float) -> None:
        """Waits until systemd has heard nothing for so long."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                self._told.get(timeout=seconds)
            except queue.Empty:
                return
        raise AssertionError("it was never silent")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self.process = None
        return code

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._closing = True
        self._reader.join()
        self.notify.close()

    def _read_notices(self) -> None:
        """As systemd does, always: the kernel holds ten datagrams and then makes the sender wait."""
        while not self._closing:
            try:
                message = self.notify.recv(4096).decode()
            except TimeoutError:
                continue
            self._told.put(message)
            while self.deaf_from and self.deaf_from in message and not self._closing:
                time.sleep(0.01)

    def http(self) -> httpx.Client:
        # no connection outlives its request: the daemon may be killed between two
        transport = httpx.HTTPTransport(uds=str(self.socket), limits=httpx.Limits(max_keepalive_connections=0))
        return httpx.Client(transport=transport, base_url="http://flashd", timeout=PATIENCE)

    def rss(self) -> int:
        """Bytes of RAM that it holds."""
        assert self.process is not None
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def job(self, client: httpx.Client, number: int) -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/api/jobs/{number}").json()
        return found

    def ended(self, client: httpx.Client, number: int, seconds: float = PATIENCE) -> dict[str, Any]:
        """A job once it has ended; a trigger that went off may not have started it yet."""
        until = time.monotonic() + seconds
        while True:
            job = self.job(client, number)
            if job.get("state", State.QUEUED) not in (State.QUEUED, State.RUNNING):
                return job
            assert time.monotonic() < until, f"job {number} did not end: {job}"
            time.sleep(0.05)
