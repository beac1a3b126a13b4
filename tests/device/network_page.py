"""The kiosk's page on a network: the API and the page behind a PIN, on every address of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from device import kiosk
from device.appliance import Appliance
from flashd.config.settings import Network
from flashd.daemon.http.server import Server
from flashd.daemon.jobs import Jobs
from tests.device.kiosk_page import api_of, free_port

CODE = "493817"


class Board(NamedTuple):
    """A server on a network; the machine is called board."""

    appliance: Appliance
    port: int
    socket: Path
    application: Starlette
    server: Server

    @property
    def routes(self) -> list[tuple[str, str]]:
        """Every method and path that is served, with something for what a path leaves open."""
        return [
            (method, route.path.partition("{")[0] + ("x" if "{" in route.path else ""))
            for route in self.application.routes
            if isinstance(route, Route)
            for method in sorted((route.methods or set()) - {"HEAD"})
        ]


Serve = Callable[..., Board]


@pytest.fixture
def serve(jobs: Jobs, appliance: Callable[..., Appliance], tmp_path: Path) -> Iterator[Serve]:
    """Serves an appliance on a network, again on the same port if one is given; `configured`: whether it is known."""
    one = appliance(
        "kiosk: {title: Greenhouse, presets: []}\n"
        "triggers: [{kind: manual, name: pump, prompt: 'Pump?', choose: ['yes', 'no'],"
        " drive: {pin: 5, answer: 'yes', most: 4}}]"
    )
    with ExitStack() as stack:

        def serve(port: int = 0, configured: bool = True) -> Board:
            port = port or free_port()
            server = Server(tmp_path / "api.sock", None, port)
            stack.callback(server.close)
            stack.callback(server.stop)
            stack.callback(jobs.close)
            network = kiosk.network(Network(port=port, code=CODE), "Board") if configured else None
            application = api_of(one, jobs).application([*kiosk.routes(one)], False, network)
            server.start(application)
            return Board(one, port, tmp_path / "api.sock", application, server)

        yield serve
