"""The kiosk: one page for a browser on the device itself, over the same API as everybody else's.

Answers are Markdown, which the browser renders: marked and DOMPurify are 82 KB of files that the daemon never holds;
markdown-it-py would take 2 MiB of its RAM (measured).
"""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from device.controls import Controls
from device.feed import Feed
from flashd.config.settings import Network
from flashd.daemon.http import ways_in
from flashd.daemon.http.signed_in import SignedIn
from flashd.daemon.openai.refusals import refusal

PAGE = Path(__file__).parent / "page"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from anywhere else, and runs no script that is in an answer."""

CODE_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

FILES = "/page/"
OVER_NETWORK = frozenset(
    {
        ("GET", "/"), ("GET", "/api/events"), ("GET", "/api/status"), ("POST", "/v1/chat/completions"),
        ("POST", "/api/mute/on"), ("POST", "/api/mute/off"),
    }
)  # fmt: skip
"""What the page does, and so all that is allowed to who has said its PIN on the local network."""


def network(settings: Network, hostname: str) -> ways_in.Network:
    """The page on the local network, for a machine of that name."""
    names = tuple(dict.fromkeys(name.lower() for name in (hostname, f"{hostname.partition('.')[0]}.local")))
    form = partial(_code_form, (PAGE / "code.html").read_text("utf-8"))
    return ways_in.Network(settings.port, names, SignedIn(settings.code), OVER_NETWORK, FILES, form)


def _code_form(page: str, words: str, status: int) -> Response:
    """Asks for the PIN."""
    return HTMLResponse(page.replace("<!-- words -->", escape(words)), status, CODE_HEADERS)


def routes(controls: Controls) -> list[Route]:
    """The page, its files, the stream of what happens, and the switch that mutes the appliance."""
    feed = Feed(controls)
    files = {str(path.relative_to(PAGE)) for path in PAGE.rglob("*") if path.is_file()}

    async def show(http: Request) -> Response:
        name = http.path_params.get("name", "index.html")
        if name not in files:
            return JSONResponse({"error": {"message": f"the page has no file {name!r}", "code": 404}}, 404)
        return FileResponse(PAGE / name, headers=HEADERS)

    async def happens(_: Request) -> Response:
        return StreamingResponse(feed.open(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def mute(http: Request) -> Response:
        state = http.path_params["state"]
        if state not in ("on", "off"):
            return refusal(400, f"a mute that is {state!r}; allowed are on and off")
        controls.mute(state == "on")
        return JSONResponse({"muted": controls.muted})

    return [
        Route("/", show),
        Route(FILES + "{name:path}", show),
        Route("/api/events", happens),
        Route("/api/mute/{state:str}", mute, methods=["POST"]),
    ]
