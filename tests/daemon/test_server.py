"""The API over a real socket and a queue that a clerk answers: who goes away, who is one too many."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest

from flashd.cli.client import Client
from flashd.daemon.api import Api
from flashd.daemon.jobs import Jobs
from flashd.daemon.server import Server
from flashd.daemon.spool import Spool
from flashd.errors import Busy, CannotWrite
from tests.waiting import wait

ASK = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with closing(Spool(tmp_path / "spool.db", keep=50)) as spool, closing(Jobs(spool, most_waiting=4)) as jobs:
        yield jobs


@pytest.fixture
def served(tmp_path: Path, jobs: Jobs) -> Iterator[Path]:
    """The socket of an API."""
    server = Server(tmp_path / "api.sock", None)
    api = Api(jobs, "a model", msgspec.Struct, lambda name: pytest.fail(name), lambda: b"")
    server.start(api.application([]))
    yield tmp_path / "api.sock"
    jobs.close()
    server.stop()
    server.close()


def request(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def test_who_goes_away_is_seen_while_the_answer_is_worked_on(served: Path, jobs: Jobs) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served))
        client.sendall(request("/v1/chat/completions", ASK))
        wait(lambda: jobs.waiting)
        job = jobs.take(0)
        assert job is not None and jobs.wanted(job)

    def goes_on() -> bool:
        jobs.progress(job, 1, 2, 3)  # as often as the worker says how far it is
        time.sleep(0.1)
        return jobs.wanted(job)

    wait(lambda: not goes_on())


def test_one_connection_too_many_is_told_so(served: Path) -> None:
    with ExitStack() as stack:
        for _ in range(64):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(served))
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        with (
            closing(Client(served)) as one_more,
            pytest.raises(Busy, match="the daemon refuses: Service Unavailable; try again later"),
        ):
            list(one_more.ask(ASK))


def test_why_a_socket_cannot_be_had(served: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match=r"api\.sock: Address already in use; is another flashd running\?"):
        Server(served, None)
    with pytest.raises(CannotWrite, match=r"AF_UNIX path too long$"):
        Server(tmp_path / ("long" * 40), None)
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"File exists$"):
        Server(tmp_path / "file" / "api.sock", None)
