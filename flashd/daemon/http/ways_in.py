"""Who may do what, by the way in: the Unix socket, the port on loopback, the port on the local network.

Whoever opens the socket is a member of its group. The ports are reached by browsers too, and a browser sends what a
stranger's page tells it to; so they are asked by this machine's own names, and by pages that came from here.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flashd.daemon.http.signed_in import SIGNED_IN_SECONDS, SignedIn
from flashd.daemon.openai.refusals import refusal
from flashd.errors import UsageError

log = logging.getLogger(__name__)

OTHERS = "only for this machine's own pages and programs"
JOBS_HIDDEN = "jobs are shown on the socket alone; set api: {loopback_jobs: true} to show them here"
NOT_FROM_AFAR = "not on the local network: ask on the board itself"
SIGN_IN_FIRST = "the PIN is needed first: open / in a browser"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

HOST = re.compile(r"(?:([A-Za-z0-9._-]*)|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{1,5}))?")
"""RFC 9112: a Host header is a name or an address, and a port. An older client sends none."""

LAST_PORT = 65535

COOKIE = "flashd-page"
SIGN_IN = "/code"
"""Where the PIN is sent to."""

CODE_BYTES, CODE_SECONDS = 256, 10.0
"""What a body with a PIN may have, and how long it may take."""


@dataclass(frozen=True)
class Network:
    """The page on the local network."""

    port: int
    names: tuple[str, ...]  # of this machine, as others on the network call it
    signed_in: SignedIn
    may: frozenset[tuple[str, str]]  # methods and paths for who has said the PIN
    files: str  # what the paths of the page's files begin with; they are for everybody
    form: Callable[[str, int], Response]  # asks for the PIN, with a sentence and an HTTP status


class WaysIn:
    """Refuses what is not allowed on the way that it came.

    Args:
        app: what is behind.
        jobs: whether jobs are listed on loopback, where every user of the machine can ask.
        network: the page on the local network; None: nothing is allowed on any address but loopback's.
    """

    def __init__(self, app: ASGIApp, jobs: bool, network: Network | None) -> None:
        self._app, self._jobs, self._network = app, jobs, network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._response(scope, receive) if scope["type"] == "http" else None
        await (response or self._app)(scope, receive, send)

    async def _response(self, scope: Scope, receive: Receive) -> Response | None:
        """None: the application answers."""
        server = scope.get("server")
        if server is None or server[1] is None:  # a Unix socket has no port
            return None
        host = HOST.fullmatch(Headers(scope=scope).get("host", ""))
        if host is None or (port := int(host[3] or 80)) > LAST_PORT:
            return refusal(400, "the Host header is malformed")
        name = (host[1] or host[2] or "").lower()
        if self._network is not None and server[1] == self._network.port:
            return await self._on_network(self._network, scope, receive, name, port)
        if server[0] not in LOOPBACK or name not in LOOPBACK or not _from_own_page(scope):
            return refusal(403, OTHERS)
        if scope["path"].startswith("/api/jobs") and not self._jobs:
            return refusal(403, JOBS_HIDDEN)
        return None

    async def _on_network(
        self, network: Network, scope: Scope, receive: Receive, name: str, port: int
    ) -> Response | None:
        address = scope["server"][0]
        if not _is_local(scope) or not _from_own_page(scope):
            return refusal(403, OTHERS)
        if port != network.port or name not in (address, *network.names):  # a name of a stranger's that leads here
            return PlainTextResponse(f"Open http://{address}:{network.port}/ instead.\n", 403)
        method, path = "GET" if scope["method"] == "HEAD" else scope["method"], scope["path"]
        if (method, path) == ("POST", SIGN_IN):
            return await _sign_in(network, Request(scope, receive))
        if method == "GET" and path.startswith(network.files):
            return None
        if not network.signed_in.knows(Request(scope).cookies.get(COOKIE, "")):
            return network.form("", 401) if (method, path) == ("GET", "/") else refusal(401, SIGN_IN_FIRST)
        return None if (method, path) in network.may else refusal(403, NOT_FROM_AFAR)


def _is_local(scope: Scope) -> bool:
    """Whether the client is on a network of its own: a router that passes strangers on names their addresses."""
    client = scope.get("client")
    try:
        ip = ip_address(client[0]) if client is not None else None
    except ValueError:  # a program of this machine says in X-Forwarded-For what is not an address
        return False
    return ip is not None and ip.is_private and not ip.is_unspecified


def _from_own_page(scope: Scope) -> bool:
    """Whether no page of somebody else's has sent this: a browser says which page did."""
    headers = Headers(scope=scope)
    return headers.get("origin") in (None, f"http://{headers.get('host', '')}")


async def _sign_in(network: Network, http: Request) -> Response:
    try:
        code = _code(await _form(http))
    except UsageError as error:
        return network.form(str(error), 400)
    if wait := network.signed_in.wait():
        return network.form(f"Too many wrong PINs. Please try again in {wait + 1:.0f} seconds.", 429)
    token = network.signed_in.enter(code)
    if token is None:
        log.warning("api.network: a wrong PIN from %s", http.client.host if http.client else "nowhere")
        return network.form("That was not the PIN.", 401)
    response = RedirectResponse("/", 303)
    response.set_cookie(COOKIE, token, max_age=SIGNED_IN_SECONDS, httponly=True, samesite="strict")
    return response


async def _form(http: Request) -> bytes:
    """The body. Raises UsageError if it is too long or does not come."""
    data = bytearray()
    try:
        async with asyncio.timeout(CODE_SECONDS):
            async for chunk in http.stream():
                data += chunk
                if len(data) > CODE_BYTES:
                    raise UsageError("That is too long for a PIN.")
    except (TimeoutError, ClientDisconnect) as error:
        raise UsageError("The PIN did not come in time.") from error
    return bytes(data)


def _code(form: bytes) -> str:
    """What was typed. Raises UsageError if that is nothing, or if there is anything else than the PIN, or two."""
    fields = parse_qsl(form.decode("ascii", "replace"), keep_blank_values=True)
    if other := next((name for name, _ in fields if name != "code"), None):
        raise UsageError(f"{other!r} is not asked for here.")
    if len(fields) > 1:
        raise UsageError("That was more than one PIN.")
    if not (typed := "".join(value for _, value in fields).replace(" ", "")):
        raise UsageError("Please type the PIN.")
    return typed
