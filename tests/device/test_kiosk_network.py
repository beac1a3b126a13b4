"""The page on the local network in a browser: its PIN, an answer, and the PIN again after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.kiosk_page import NEEDED, Page, start_browser
from tests.device.network_page import CODE, Serve, serve
from tests.device.test_kiosk_looks import SIZES, assess, axe
from tests.waiting import wait

__all__ = ["axe", "serve"]  # fixtures

pytestmark = NEEDED


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for which this machine is another one on the network, as it is for a phone: by no name that it trusts."""
    yield from start_browser("--host-resolver-rules=MAP board.local 127.0.0.1")


def test_a_phone_says_the_pin_and_asks(browser: Any, serve: Serve, jobs: Jobs, axe: str) -> None:
    board = serve()
    page = Page(browser, board.appliance, board.server)
    browser.get(f"http://board.local:{board.port}/")
    assert page.run("return [window.isSecureContext, document.title]") == [False, "flashd"]
    for size in SIZES:
        page.resize(*size)
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            assess(page, axe, f"the PIN, {size}, {scheme}")
    page.find("#code").send_keys("111112\n")
    wait(lambda: page.text("[role=alert]") == "That was not the PIN.")
    assess(page, axe, "a wrong PIN")
    page.find("#code").send_keys(CODE + "\n")
    wait(lambda: page.text("#state") == "Ready" and page.text("#title") == "Greenhouse")
    assert page.run("return document.cookie") == ""
    clerk = Clerk(jobs, words=("It is ", "**warm**."))
    page.ask("Is it warm?")
    wait(lambda: page.text(".answer") == "It is warm.")
    clerk.close()


def test_after_a_restart_the_pin_is_asked_for_again(browser: Any, serve: Serve) -> None:
    board = serve()
    page = Page(browser, board.appliance, board.server)
    browser.get(f"http://board.local:{board.port}/")
    page.find("#code").send_keys(CODE + "\n")
    wait(lambda: page.text("#state") == "Ready")
    board.server.stop()
    board.server.close()
    wait(lambda: page.text("#state") == "Starting")
    serve(board.port)
    wait(lambda: page.all("#code"))
