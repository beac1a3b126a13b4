"""Serial lines and API bodies of any kind: refused in words, with nothing left behind."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.consoles.machine import Machine
from device.controls import Facts, Status
from flashd.config.settings import Serial, Settings
from flashd.daemon.http.api import Api
from flashd.daemon.job import Job
from flashd.daemon.jobs import Jobs
from flashd.daemon.spool import Spool
from tests.daemon.fake_worker import Clerk, request
from tests.fuzz.conftest import tries

pytestmark = pytest.mark.slow

KEYS = st.sampled_from(
    [
        "prompt", "messages", "role", "content", "id", "max_tokens", "choose", "json_schema", "priority", "trigger",
        "cancel", "status", "seed", "deadline", "temperature", "stream", "stop", "n", "response_format", "type",
    ]
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    | st.sampled_from(["user", "system", "json_schema", 1 << 63, -1, 1e308, "\x00", "\ud800", "{{ 7 * 7 }}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5),
    max_leaves=10,
)  # fmt: skip
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=6)
BODIES = OBJECTS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80)


PATHS = [
    "/v1/chat/completions", "/v1/completions", "/api/triggers/greet", "/api/triggers/x", "/api/jobs/7",
    "/api/jobs/" + "9" * 30, "/api/jobs?most=%C2%B2", "/api/jobs?most=" + "9" * 5000, "/nowhere",
]  # fmt: skip


class Front:
    """What a console sees of an appliance, with a real queue behind it."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.settings, self.muted = jobs, Settings(), False

    def mute(self, muted: bool) -> None:
        self.muted = muted

    def start(self, name: str, **values: Any) -> Job:
        if name != "greet":
            raise KeyError(name)
        return self.jobs.submit(request("Greet.", source="trigger:greet"))

    def calling(self, names: Sequence[str], asked: str = "") -> None:
        """No tool may be called."""

    def status(self) -> Status:
        return Status(
            phase="idle", muted=self.muted, waiting=0, running=[], sensors={}, temperature=None, throttled=None,
            title="", presets=[], triggers=["greet"], model={}, last={}, demo=False,
        )  # fmt: skip


class Lines:
    """A port that gives some lines and then says that the daemon stops."""

    def __init__(self, data: bytes, stopping: threading.Event) -> None:
        self._data, self._stopping, self.behind = data, stopping, False
        self.written: list[dict[str, Any]] = []

    def read(self, timeout: float) -> bytes:
        data, self._data = self._data[:4096], self._data[4096:]
        if not data:
            self._stopping.set()
        return data

    def write(self, text: str) -> None:
        self.written.append(json.loads(text))

    def note(self, what: str) -> None:
        """Said in the journal."""


def serve(jobs: Jobs, data: bytes) -> None:
    """A session in machine mode that is given `data`."""
    stopping = threading.Event()
    port = Lines(data, stopping)
    Machine(Front(jobs), Serial(name="board", port="none", mode="machine")).run(port, stopping)  # type: ignore[arg-type]
    assert port.written[0] == {"event": "ready"}
    known = {"ready", "accepted", "text", "end", "error", "status", "restarted"}
    assert {e["event"] for e in port.written} <= known
    assert all(e["message"] for e in port.written if e["event"] == "error")
    assert not jobs._watches


def call(jobs: Jobs, method: str, path: str, body: bytes) -> None:
    """One request to the API."""
    api = Api(jobs, "m", lambda: Facts(), Front(jobs).start, lambda: b"", lambda asked, _: asked)
    application = api.application([])

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=application)  # an error in it is raised here
        async with httpx.AsyncClient(transport=transport, base_url="http://flashd") as client:
            return await client.request(method, path, content=body)

    reply = asyncio.run(ask())
    assert reply.status_code in (200, 400, 404, 405, 429), reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]
    assert not jobs._watches


@contextmanager
def answering(folder: Path) -> Iterator[Jobs]:
    """A real queue and somebody who answers."""
    spool = Spool(folder / "spool.db", keep=20)
    jobs = Jobs(spool, most_waiting=8)
    clerk = Clerk(jobs)
    try:
        yield jobs
    finally:
        clerk.close()
        jobs.close()
        spool.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with answering(tmp_path_factory.mktemp("fuzz")) as jobs:
        yield jobs


@tries(200)
@given(st.lists(BODIES, min_size=1, max_size=50))
def test_serial_lines(jobs: Jobs, lines: list[bytes]) -> None:
    serve(jobs, b"\n".join(lines) + b"\n")


@tries(200)
@given(st.sampled_from(PATHS), st.sampled_from(["POST", "GET", "DELETE", "PUT"]), BODIES)
def test_api_bodies(jobs: Jobs, path: str, method: str, body: bytes) -> None:
    call(jobs, method, path, body)
