"""The kiosk: one page for a browser on the device itself, over the same API as everybody else's.

Answers are Markdown, which the browser renders: marked and DOMPurify are 82 KB of files that the daemon never holds;
markdown-it-py would take 2 MiB of its RAM (measured).
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from device.controls import Controls
from device.feed import Feed

PAGE = Path(__file__).parent / "page"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from anywhere else, and runs no script that is in an answer."""


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
        controls.mute(http.path_params["state"] == "on")
        return JSONResponse({"muted": controls.muted})

    return [
        Route("/", show),
        Route("/page/{name:path}", show),
        Route("/api/events", happens),
        Route("/api/mute/{state:str}", mute, methods=["POST"]),
    ]
