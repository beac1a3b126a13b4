"""What a request's head may say, on every way in and before anything else looks at it."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flashd.daemon.http.connections import MOST_HEADERS
from flashd.daemon.openai.refusals import refusal

LONGEST_ADDRESS = 1024
"""Bytes of a request's path and query."""

ASKED_IN_ADDRESS = {"/api/jobs": ("most", "before")}
"""What may stand behind the question mark of an address, once each. Other paths take nothing there."""


class Heads:
    """Refuses requests whose head is too large, or asks for something that is not understood.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = _refused(scope) if scope["type"] == "http" else None
        await (refused or self._app)(scope, receive, send)


def _refused(scope: Scope) -> JSONResponse | None:
    if len(scope["raw_path"]) + len(scope["query_string"]) > LONGEST_ADDRESS:
        return refusal(400, f"an address of more than {LONGEST_ADDRESS} bytes")
    if len(scope["headers"]) > MOST_HEADERS:
        return refusal(431, f"more than {MOST_HEADERS} headers")
    names = [name for name, _ in scope["headers"]]
    if b"content-length" in names and b"transfer-encoding" in names:  # RFC 9112, section 6.1: two say where it ends
        return refusal(400, "a body with both Content-Length and Transfer-Encoding")
    return _address_refused(scope["path"], scope["query_string"])


def _address_refused(path: str, query: bytes) -> JSONResponse | None:
    """Why what stands behind the question mark is refused: nothing that is not understood is ignored."""
    known, seen = ASKED_IN_ADDRESS.get(path, ()), set[str]()
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in known or name in seen:
            allowed = " and ".join(known) + ", once each" if known else "nothing"
            words = f"{name!r} in the address; allowed behind the question mark is {allowed}"
            return refusal(400, words, name, "unknown_parameter")
        seen.add(name)
    return None


class WithoutBody:
    """Refuses requests that have a body, of a route that reads none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stated = [value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")]
        has_body = any(value != b"0" for value in stated)
        refused = refusal(400, f"{scope['path']} takes no body", "body") if has_body else None
        await (refused or self._app)(scope, receive, send)
