"""The kiosk: one page for a browser on the device itself, over the same API as everybody else's."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from device.controls import Controls

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
"""The page is whole: it loads nothing from anywhere."""


def routes(controls: Controls) -> list[Route]:
    """The page, and the switch that mutes the appliance."""
    page = files("device").joinpath("kiosk.html").read_text("utf-8")

    async def show(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    async def mute(http: Request) -> Response:
        controls.mute(http.path_params["state"] == "on")
        return JSONResponse({"muted": controls.muted})

    return [Route("/", show), Route("/api/mute/{state:str}", mute, methods=["POST"])]
