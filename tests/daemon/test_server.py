"""The API over a real socket and a queue that a clerk answers: who goes away, who is one too many."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx2 as httpx
import msgspec
import pytest

from flashd.cli.client import Client
from flashd.cli.progress import CLEAR, Waiting
from flashd.daemon.http import api, connections
from flashd.daemon.http.admission import MOST_WAITING
from flashd.daemon.http.api import Api
from flashd.daemon.http.connections import MOST_CONNECTIONS, MOST_HEADERS, READ_BYTES
from flashd.daemon.http.server import Server
from flashd.daemon.job import MAX_TEXT, Request, State, Turn
from flashd.daemon.jobs import Jobs
from flashd.daemon.openai import answers
from flashd.daemon.spool import Spool
from flashd.errors import Busy, CannotWrite
from tests.daemon import fake_worker as clerk
from tests.daemon.fake_worker import Clerk
from tests.waiting import wait

ASK = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with closing(Spool(tmp_path / "spool.db", keep=50)) as spool, closing(Jobs(spool, most_waiting=4)) as jobs:
        yield jobs


def made(jobs: Jobs) -> Api:
    return Api(jobs, "a model", msgspec.Struct, lambda name: pytest.fail(name), lambda: b"", lambda asked, _: asked)


def read_answer(client: socket.socket) -> bytes:
    """What is answered with JSON."""
    client.settimeout(60)
    said = b""
    while not said.endswith(b"}") and (piece := client.recv(4096)):
        said += piece
    return said


@pytest.fixture
def served(tmp_path: Path, jobs: Jobs) -> Iterator[Path]:
    """The socket of an API."""
    server = Server(tmp_path / "api.sock", None)
    routes = made(jobs)
    server.start(routes.application([]))
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


def idle(stack: ExitStack, served: Path, count: int, sends: bytes = b"") -> list[socket.socket]:
    """Connections whose clients send nothing more."""
    clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
    for client in clients:
        client.connect(str(served))
        client.sendall(sends)
    return clients


def http(served: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(served)), base_url="http://localhost", timeout=60)


HALF_A_BODY = request("/v1/chat/completions", ASK)[:-9]


def test_who_sends_half_a_body_makes_room_for_a_new_client(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service waits for all of these bodies, and has refused none of them yet."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 8)
    with ExitStack() as stack:
        idle(stack, served, 8, HALF_A_BODY)
        time.sleep(0.5)
        with http(served) as client:
            assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("sends", [b"", b"GET /health HTTP/1.1\r\n", HALF_A_BODY])
def test_clients_that_send_nothing_more_lock_nobody_out(sends: bytes, served: Path) -> None:
    """None of them, half a head, half a body: more of them than there are connections."""
    with ExitStack() as stack:
        idle(stack, served, MOST_CONNECTIONS + 20, sends)
        for _ in range(10):
            with http(served) as client:
                assert client.get("/health").json() == {"status": "ok"}


def test_a_client_that_sends_no_head_is_dropped(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with ExitStack() as stack:
        for client in idle(stack, served, 3, b"GET /health HTTP/1.1\r\n"):
            client.settimeout(30)
            assert client.recv(100) == b""
        (kept,) = idle(stack, served, 1, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in read_answer(kept)
        assert kept.recv(100) == b""  # and one that asks no more


def test_a_busy_board_blames_no_client(tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop stands still until a client's time is over. He had sent a head that takes two reads."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    busy = threading.Event()

    def metrics() -> bytes:
        busy.set()
        time.sleep(1.5)
        return b""

    server = Server(tmp_path / "api.sock", None)
    routes = Api(jobs, "a model", msgspec.Struct, lambda name: pytest.fail(name), metrics, lambda asked, _: asked)
    server.start(routes.application([]))
    with ExitStack() as stack:
        stack.callback(server.close)
        stack.callback(server.stop)
        (client, other) = idle(stack, tmp_path / "api.sock", 2)
        other.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert busy.wait(60)
        client.sendall(headed(b"a:\r\n" * (READ_BYTES // 4 + 20)))
        assert b" 431 " in read_answer(client)


def test_a_body_that_does_not_come_is_refused(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_SECONDS", 0.2)
    with ExitStack() as stack:
        for client in idle(stack, served, 8, HALF_A_BODY):  # more than there are places
            said = read_answer(client)
            assert b" 400 " in said and b"the body did not come within 0.2 s" in said


@pytest.mark.parametrize("head", ["", "Connection: close\r\n"])
@pytest.mark.parametrize("where", ["socket", "loopback"])
@pytest.mark.parametrize(
    ("path", "large", "status"),
    [("nowhere", False, 404), ("v1/completions", True, 400), ("v1/completions", False, 400)],
)
def test_who_sends_a_large_body_before_he_reads_is_answered(
    path: str, large: bool, status: int, where: str, head: str, served: Path, loopback: Callable[[bool], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not one of these bodies is read before its answer: a path that is not there, too long, too late."""
    monkeypatch.setattr(api, "BODY_SECONDS", 0.0)
    body = b"x" * ((2 if large else 1) << 20)
    with ExitStack() as stack:
        if where == "socket":
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(served))
        else:
            address = loopback(False).removeprefix("http://").split(":")
            client = stack.enter_context(socket.create_connection((address[0], int(address[1]))))
        client.settimeout(60)
        asks = f"POST /{path} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n"
        client.sendall(asks.encode())
        for at in range(0, len(body), 1 << 16):  # steadily
            client.sendall(body[at : at + (1 << 16)])
        assert read_answer(client).startswith(f"HTTP/1.1 {status} ".encode())
        if head:
            assert client.recv(1) == b""
        else:  # and the connection is as good as new
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 OK" in read_answer(client)


def test_the_rest_of_a_body_is_waited_for_so_long(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 0.2)
    with ExitStack() as stack:
        for more in ("", "Connection: close\r\n"):
            head = f"POST /nowhere HTTP/1.1\r\nHost: x\r\n{more}Content-Length: 1000\r\n\r\n"
            (client,) = idle(stack, served, 1, head.encode())
            assert b" 404 " in read_answer(client)
            assert client.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                for _ in range(100):
                    client.sendall(b"x")
                    time.sleep(0.05)


@pytest.mark.slow
def test_a_burst_waits_its_turn_in_order(served: Path, jobs: Jobs) -> None:
    """Many more prompts than the queue has places: all are answered, the first one first."""
    count = 60
    with ExitStack() as stack:
        clients = []
        for i in range(count):
            asked = {"messages": [{"role": "user", "content": f"number {i}"}]}
            clients += idle(stack, served, 1, request("/v1/chat/completions", asked))
            with http(served) as other:
                other.get("/health")  # so that the next one comes later
        answering = Clerk(jobs)
        for client in clients:
            assert b" 200 OK" in read_answer(client)
        answering.close()
    assert [job.request.turns[0].content for job in answering.answered] == [f"number {i}" for i in range(count)]


def test_several_answers_at_once_take_their_places_and_lock_nobody_out(served: Path, jobs: Jobs) -> None:
    """Each request asks for as many answers as the queue has room for: the others wait, and none is refused."""
    asked = {"messages": ASK["messages"], "n": jobs.most_of_clients}
    with ExitStack() as stack:
        clients = idle(stack, served, 3, request("/v1/chat/completions", asked))
        clients += idle(stack, served, 3, request("/v1/chat/completions", ASK))
        wait(lambda: jobs.waiting == jobs.most_of_clients)
        jobs.submit(clerk.request("Who?", source="trigger:door"))  # the board's own have places of their own
        with closing(Clerk(jobs)):
            for client in clients:
                assert b" 200 OK" in read_answer(client)
        (greedy,) = idle(stack, served, 1, request("/v1/chat/completions", asked | {"n": jobs.most_of_clients + 1}))
        answer = read_answer(greedy)
        assert b" 400 " in answer and b"the queue has room for" in answer


def test_who_waits_sees_his_place_at_once_and_goes_on_seeing_it(
    served: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "QUIET_SECONDS", 0.1)
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    first, second = jobs.submit(clerk.request()), jobs.submit(clerk.request())
    assert jobs.take(0) is first
    told: list[str] = []
    with closing(Waiting()) as row, closing(Client(served)) as client:

        def show(text: str) -> None:
            row.show(text)
            told.append(screen.getvalue().rpartition("\r")[2].removesuffix(CLEAR))
            if len(told) == 3:  # nothing has happened since the first
                jobs.finish(first, State.DONE, "stop")
                assert jobs.take(0) is second
            elif told[-1] == "waiting, 1 before this":
                jobs.finish(second, State.DONE, "stop")
                answering.append(Clerk(jobs))

        answering: list[Clerk] = []
        assert list(client.ask(ASK, show))
        answering[0].close()
    assert told[:3] == ["waiting, 2 before this"] * 3 and "waiting, 1 before this" in told


def test_more_than_may_wait_are_refused_at_once(served: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        idle(stack, served, MOST_WAITING + 3, HALF_A_BODY)  # three have a place
        with (
            closing(Client(served)) as one_more,
            pytest.raises(Busy, match="too many requests wait already; try again later"),
        ):
            list(one_more.ask(ASK))
        with http(served) as client:
            assert client.get("/health").json() == {"status": "ok"}
    assert not caplog.records  # and a line each would fill the journal


def headed(more: bytes) -> bytes:
    return request("/v1/chat/completions", ASK).replace(b"Host: x\r\n", b"Host: x\r\n" + more)


def of_two_lengths() -> bytes:
    """A request whose body is right if its chunks are what counts."""
    head, _, body = headed(b"Transfer-Encoding: chunked\r\n").partition(b"\r\n\r\n")
    return head + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize(
    ("sends", "status"),
    [
        (headed(b"a:\r\n" * (MOST_HEADERS - 2)), 200), (headed(b"a:\r\n" * (MOST_HEADERS - 1)), 431),
        (headed(b"a: " + b"b" * 4000 + b"\r\n"), 200), (b"GET / HTTP/1.1\r\na: " + b"b" * READ_BYTES, 400),
        (headed(b"").replace(b"completions", b"completions?" + b"a" * 2000), 400),
        (of_two_lengths(), 400),
    ],
)  # fmt: skip
def test_a_head_is_bounded(sends: bytes, status: int, served: Path, jobs: Jobs) -> None:
    with ExitStack() as stack, closing(Clerk(jobs)):
        (client,) = idle(stack, served, 1, sends)
        assert read_answer(client).startswith(f"HTTP/1.1 {status} ".encode())


def test_heads_of_requests_that_wait_take_little(served: Path) -> None:
    """Thousands of empty headers fit in a head. A request that waits does not keep them."""
    count, head = 12, headed(b"a:\r\n" * 3900)
    tracemalloc.start()
    try:
        with ExitStack() as stack:
            clients = idle(stack, served, count, head)
            with http(served) as other:
                other.get("/health")
            _, peak = tracemalloc.get_traced_memory()
            assert all(b" 431 " in read_answer(client) for client in clients)
    finally:
        tracemalloc.stop()
    assert peak < count * len(head) + (4 << 20)


def test_a_client_that_does_not_read_is_dropped(served: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    turns = tuple(Turn("user", "x" * MAX_TEXT) for _ in range(4))  # more than the kernel holds for a socket
    number = jobs.submit(Request(turns=turns, source="test")).id
    with ExitStack() as stack:
        asked = f"GET /api/jobs/{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        client, *_ = idle(stack, served, 5, asked)  # more than may read at once
        with http(served) as other:
            assert other.get(f"/api/jobs/{number}").json()["id"] == number  # all those before were dropped
        client.settimeout(30)
        read = b""
        while piece := client.recv(1 << 16):
            read += piece
        assert 0 < len(read) < 4 * MAX_TEXT


def test_lists_have_pages_and_heads(served: Path, jobs: Jobs) -> None:
    for i in range(3):
        jobs.submit(clerk.request(f"{i} " + "long " * 1000))
    with http(served) as client:
        first = client.get("/api/jobs?most=2").json()
        assert [head["id"] for head in first] == [3, 2]
        assert first[0]["prompt"].startswith("2 long") and len(first[0]["prompt"]) == 200
        assert [head["id"] for head in client.get("/api/jobs?most=2&before=2").json()] == [1]
        assert len(client.get("/api/jobs/1").json()["request"]["turns"][0]["content"]) == 5002


def test_what_an_address_asks_for_and_is_not_known_is_refused(served: Path) -> None:
    with http(served) as client:
        for path, name in (
            ("/api/jobs?most=1&befor=2", "befor"), ("/api/jobs?most=1&most=2", "most"),
            ("/api/jobs/1?most=1", "most"), ("/health?%F0%9F%98%80", "\U0001f600"),
            ("/v1/models?limit", "limit"), ("/nowhere?a=b", "a"),
        ):  # fmt: skip
            reply = client.get(path)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"], error["code"]) == (400, name, "unknown_parameter"), path
            assert repr(name) in error["message"]
        reply = client.post("/v1/chat/completions?stream=true", json=ASK)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "stream"
        assert client.get("/api/jobs?").status_code == client.get("/health?").status_code == 200


def test_what_is_no_number_is_refused(served: Path) -> None:
    with http(served) as client:
        for path in ("/api/jobs/" + "9" * 900, "/api/jobs/x", "/api/jobs?most=-1", "/api/jobs?before=" + "9" * 30):
            reply = client.get(path)
            assert reply.status_code == 400 and "is not a number" in reply.json()["error"]["message"], path
        assert client.delete("/api/jobs/" + "9" * 5000).status_code == 400
        assert client.get("/api/jobs/" + "9" * 18).status_code == 404


@pytest.fixture
def loopback(tmp_path: Path, jobs: Jobs) -> Iterator[Callable[[bool], str]]:
    """Serves on loopback; gives the address."""
    with ExitStack() as stack:

        def serve(loopback_jobs: bool) -> str:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            server = Server(tmp_path / f"loop-{port}.sock", port)
            stack.callback(server.close)
            stack.callback(server.stop)
            routes = made(jobs)
            server.start(routes.application([], loopback_jobs))
            return f"http://127.0.0.1:{port}"

        yield serve


def test_a_malformed_host_is_refused(loopback: Callable[[bool], str], served: Path) -> None:
    at = loopback(False)
    for host in ("[", "[::1", "[x]", "a]b", "x@127.0.0.1", "127.0.0.1/", "localhost?x", "localhost:65536"):
        reply = httpx.get(f"{at}/health", headers={"Host": host})
        assert reply.status_code == 400 and "Host header is malformed" in reply.json()["error"]["message"], host
        with http(served) as client:
            assert client.get("/nowhere", headers={"Host": host}).status_code == 404


def test_jobs_are_the_socket_s_alone_unless_configured(loopback: Callable[[bool], str], jobs: Jobs) -> None:
    number = jobs.submit(clerk.request("a secret")).id
    at = loopback(False)
    for method, path in (("GET", "/api/jobs"), ("GET", f"/api/jobs/{number}"), ("DELETE", f"/api/jobs/{number}")):
        reply = httpx.request(method, at + path)
        assert reply.status_code == 403 and "loopback_jobs" in reply.text and "secret" not in reply.text
    body = {"messages": [{"role": "user", "content": "What did they ask?"}], "session": "theirs"}
    reply = httpx.post(f"{at}/v1/chat/completions", json=body)
    assert reply.status_code == 403 and "sessions are for the socket alone" in reply.text
    assert httpx.get(f"{loopback(True)}/api/jobs").json()[0]["prompt"] == "a secret"


def test_why_a_socket_cannot_be_had(served: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match=r"api\.sock: Address already in use; is another flashd running\?"):
        Server(served, None)
    with pytest.raises(CannotWrite, match=r"AF_UNIX path too long$"):
        Server(tmp_path / ("long" * 40), None)
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"File exists$"):
        Server(tmp_path / "file" / "api.sock", None)


def test_a_name_that_stands_twice_is_refused(served: Path) -> None:
    said = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]})[:-1]
    with http(served) as client:
        for more, name in (
            (', "temperature": 0, "temperature": 1}', "temperature"),
            (', "response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1, "\\u0061": 2}}}}', "a"),
        ):  # fmt: skip
            reply = client.post("/v1/chat/completions", content=said + more)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, name)
            assert error["message"] == f"{name}: the name stands twice in one object; send it once"
