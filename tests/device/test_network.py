"""The page on the local network: nothing without its PIN, and with it what the page does and no more."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2 as httpx
import pytest

from device.kiosk import OVER_NETWORK
from flashd.daemon.http.connections import MOST_FROM_AFAR
from flashd.daemon.http.signed_in import MOST_SIGNED_IN, MOST_WRONG, SIGNED_IN_SECONDS, WRONG_EVERY, SignedIn
from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.network_page import CODE, Board, Serve, serve

__all__ = ["serve"]  # a fixture

ASK = {"messages": [{"role": "user", "content": "Is it warm?"}]}


@pytest.fixture
def board(serve: Serve) -> Board:
    return serve()


@pytest.fixture
def client(board: Board) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{board.port}", timeout=30) as client:
        yield client


def sign_in(client: httpx.Client, code: str = CODE) -> httpx.Response:
    return client.post("/code", data={"code": code})


def test_without_the_pin_there_is_a_form_and_nothing_else(board: Board, client: httpx.Client) -> None:
    form = client.get("/")
    assert form.status_code == 401 and '<label for="code">PIN</label>' in form.text
    assert "Nothing that you send here is encrypted." in form.text and "Greenhouse" not in form.text
    assert client.get("/page/page.css").status_code == 200
    tried = [(method, path) for method, path in board.routes if not path.startswith("/page/") and path != "/"]
    assert len(tried) > 12
    for method, path in tried:
        reply = client.request(method, path, json=ASK if path.startswith("/v1/") else None)
        assert reply.status_code == 401, (method, path)
        assert reply.json()["error"]["message"] == "the PIN is needed first: open / in a browser"
    forged = client.get("/api/status", headers={"Cookie": "flashd-page=" + "A" * 43})
    assert forged.status_code == 401


def test_with_the_pin_the_page_works_and_the_rest_stays_on_the_board(
    board: Board, client: httpx.Client, jobs: Jobs, clerk: Clerk
) -> None:
    entered = sign_in(client, " 493 817 ")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"].lower()
    for word in ("flashd-page=", "httponly", "samesite=strict", "path=/", f"max-age={SIGNED_IN_SECONDS}"):
        assert word in cookie
    assert 'id="talk"' in client.get("/").text and client.head("/").status_code == 200
    assert client.get("/api/status").json()["title"] == "Greenhouse"
    answer = client.post("/v1/chat/completions", json=ASK).json()
    assert answer["choices"][0]["message"]["content"] == "It is warm today."
    assert client.post("/api/mute/on").json() == {"muted": True}
    refused = [(m, p) for m, p in board.routes if (m, p) not in OVER_NETWORK and p not in ("/page/x", "/api/mute/x")]
    assert {("GET", "/api/jobs"), ("DELETE", "/api/jobs/x"), ("POST", "/api/triggers/x"), ("GET", "/metrics")} <= {
        *refused
    }
    for method, path in [*refused, ("POST", "/api/triggers/pump"), ("GET", f"/api/jobs/{answer['id']}")]:
        reply = client.request(method, path, json=ASK if path.startswith("/v1/") else None)
        assert reply.status_code == 403, (method, path)
        assert reply.json()["error"]["message"] == "not on the local network: ask on the board itself"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200), ("board:{port}", 200), ("BOARD.local:{port}", 200), ("board", 403),
        ("evil.example:{port}", 403), ("board.evil.example:{port}", 403), ("127.0.0.1:1", 403),
        ("localhost:{port}", 403), ("192.168.1.9:{port}", 403), ("", 403), ("[", 400),
    ],
)  # fmt: skip
def test_a_name_of_a_stranger_s_that_leads_here_is_refused(
    host: str, status: int, board: Board, client: httpx.Client
) -> None:
    """So that a page of theirs, whose name is made to mean this address, can ask nothing."""
    sign_in(client)
    reply = client.get("/api/status", headers={"Host": host.format(port=board.port)})
    assert reply.status_code == status
    if status == 403:
        assert reply.text == f"Open http://127.0.0.1:{board.port}/ instead.\n"


def test_what_is_not_on_or_off_changes_nothing(board: Board) -> None:
    board.appliance.mute(True)
    transport = httpx.HTTPTransport(uds=str(board.socket))
    with httpx.Client(transport=transport, base_url="http://flashd", timeout=30) as http:
        reply = http.post("/api/mute/of")
        assert reply.status_code == 400 and "allowed are on and off" in reply.json()["error"]["message"]
        assert board.appliance.muted


def test_a_page_of_a_stranger_s_can_send_nothing(board: Board, client: httpx.Client) -> None:
    sign_in(client)
    assert client.post("/api/mute/on", headers={"Origin": f"http://127.0.0.1:{board.port}"}).status_code == 200
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{board.port}", "http://127.0.0.1:1"):
        for path in ("/api/mute/on", "/code"):
            assert client.post(path, headers={"Origin": origin}, data={"code": CODE}).status_code == 403, origin


def test_whoever_comes_from_the_internet_is_refused(client: httpx.Client) -> None:
    """Even with the PIN: a router may pass them on. uvicorn takes this machine's own word for who they are."""
    strangers = ("8.8.8.8", "2001:4860::1", "0.0.0.0", "not an address", "::::")
    for address, status in (("192.168.1.7", 303), ("10.1.2.3", 303), *((each, 403) for each in strangers)):
        reply = client.post("/code", data={"code": CODE}, headers={"X-Forwarded-For": address})
        assert reply.status_code == status, address


def test_after_five_wrong_pins_nobody_may_try_for_a_minute(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(MOST_WRONG):
        wrong = sign_in(client, "000001")
        assert wrong.status_code == 401 and "That was not the PIN." in wrong.text
    assert caplog.text.count("api.network: a wrong PIN from 127.0.0.1") == MOST_WRONG
    for code in ("000001", CODE):
        late = sign_in(client, code)
        assert late.status_code == 429 and "Too many wrong PINs. Please try again in " in late.text
        assert "set-cookie" not in late.headers


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"code=",
        b"code=" + b"1" * 300,
        b"x=1",
        b"\xff\xfe",
        b"code=%ff%fe",
        b"code=493817&x=1",
        b"code=493817&code=493817",
        b"x=&code=493817",
    ],
)
def test_what_is_not_a_pin_is_no_error(body: bytes, client: httpx.Client) -> None:
    reply = client.post("/code", content=body)
    assert reply.status_code in (400, 401) and 'role="alert">' in reply.text and "set-cookie" not in reply.headers


def test_what_an_address_asks_for_is_refused_on_every_way(client: httpx.Client) -> None:
    """Before the PIN and with it: what is not understood is not ignored."""
    for _ in range(2):
        for method, path in (("POST", "/code"), ("GET", "/"), ("GET", "/page/page.css"), ("POST", "/api/mute/on")):
            reply = client.request(method, f"{path}?x=1", data={"code": CODE} if path == "/code" else None)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "x"), path
            assert "set-cookie" not in reply.headers
        assert sign_in(client).status_code == 303
    reply = client.post("/api/mute/on", json={"minutes": 5})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "body")


def test_tries_come_back_one_a_minute() -> None:
    now = 0.0
    signed_in = SignedIn(CODE, lambda: now)
    assert [signed_in.enter(str(n)) for n in range(MOST_WRONG)] == [None] * MOST_WRONG
    assert signed_in.wait() == WRONG_EVERY and signed_in.enter(CODE) is None
    now = WRONG_EVERY - 1
    assert signed_in.enter(CODE) is None
    now = WRONG_EVERY + 1
    assert signed_in.enter("wrong") is None and signed_in.wait() == WRONG_EVERY - 1
    now = 2 * WRONG_EVERY + 1
    token = signed_in.enter(CODE)
    assert token is not None and signed_in.knows(token)


def test_a_browser_stays_signed_in_for_so_long_and_so_many_do() -> None:
    now = 0.0
    signed_in = SignedIn(CODE, lambda: now)
    tokens = [signed_in.enter(CODE) or "" for _ in range(MOST_SIGNED_IN + 1)]
    assert len(set(tokens)) == MOST_SIGNED_IN + 1
    assert [signed_in.knows(token) for token in tokens] == [False] + [True] * MOST_SIGNED_IN
    now = SIGNED_IN_SECONDS
    assert not any(map(signed_in.knows, tokens))


def test_a_port_that_is_not_configured_serves_nobody_from_afar(serve: Serve) -> None:
    board = serve(configured=False)
    assert httpx.get(f"http://127.0.0.2:{board.port}/health").status_code == 403


def test_others_take_no_place_that_this_machine_s_own_programs_need(board: Board, client: httpx.Client) -> None:
    """127.0.0.2 is not the address that this machine calls itself by, so it counts as another one."""
    kept = socket.create_connection(("127.0.0.1", board.port))  # it says nothing, and owes its head the longest
    with kept, ExitStack() as stack:
        afar = [
            stack.enter_context(socket.create_connection(("127.0.0.2", board.port)))
            for _ in range(MOST_FROM_AFAR + 3)
        ]
        for dropped in afar[:3]:
            dropped.settimeout(30)
            assert dropped.recv(1) == b""
        for each in (kept, afar[-1]):
            host = each.getpeername()[0]
            each.sendall(f"GET / HTTP/1.1\r\nHost: {host}:{board.port}\r\n\r\n".encode())
            each.settimeout(30)
            assert each.recv(12) == b"HTTP/1.1 401"
