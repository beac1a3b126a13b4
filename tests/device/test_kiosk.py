"""The kiosk in a real browser: Chromium without a screen, clicked and typed at, over a queue with a clerk."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device import kiosk
from device.appliance import Appliance
from flashd.daemon.api import Api
from flashd.daemon.job import Job
from flashd.daemon.jobs import Jobs
from flashd.daemon.server import Server
from tests.daemon.clerk import Clerk
from tests.waiting import wait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1024,600",
)  # fmt: skip
PRESETS = 'kiosk: {title: Greenhouse, presets: ["Is it warm?", "<b>Bold?</b>"]}\n'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(
    browser: Any, jobs: Jobs, appliance: Callable[..., Appliance], tmp_path: Path
) -> Iterator[Callable[[], Appliance]]:
    """Opens the page over an appliance."""
    servers: list[Server] = []

    def open_page() -> Appliance:
        one = appliance(PRESETS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = Server(tmp_path / "api.sock", port)
        servers.append(server)

        def start(name: str) -> Job:
            raise KeyError(name)

        server.start(Api(jobs, "a model", one.status, start, lambda: b"").application([*kiosk.routes(one)]))
        browser.get(f"http://127.0.0.1:{port}/")
        return one

    yield open_page
    for server in servers:
        server.stop()
        server.close()


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text).strip()


def buttons(browser: Any) -> list[Any]:
    return list(browser.find_elements("css selector", "#presets button"))


def test_a_preset_is_asked_by_touch(browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    page()
    wait(lambda: len(buttons(browser)) == 2)
    assert text(browser, "title") == "Greenhouse"
    assert [b.text for b in buttons(browser)] == ["Is it warm?", "<b>Bold?</b>"]
    buttons(browser)[0].click()
    wait(lambda: text(browser, "answer") == "It is warm today.")
    assert text(browser, "question") == "Is it warm?"
    browser.find_element("id", "again").click()
    assert buttons(browser)[0].is_displayed()
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "favicon" not in e["message"]]
    assert not errors


def test_a_question_is_typed_and_the_talk_goes_on(browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    page()
    for question in ("Why?", "And then?"):
        wait(lambda: browser.find_element("id", "ask").is_enabled())
        browser.find_element("id", "text").send_keys(question + "\n")
        wait(lambda q=question: text(browser, "question") == q and text(browser, "answer") == "It is warm today.")  # type: ignore[misc]
    wait(lambda: len(clerk.answered) == 2)
    assert [t.content for t in clerk.answered[1].request.turns] == ["Why?", "It is warm today.", "And then?"]


def test_an_answer_streams_and_is_stopped(browser: Any, page: Callable[[], Appliance], jobs: Jobs) -> None:
    page()
    clerk = Clerk(jobs, words=["word "] * 50, paced=True)
    assert clerk.permits is not None
    browser.find_element("id", "text").send_keys("talk\n")
    clerk.permits.release(2)
    wait(lambda: text(browser, "answer") == "word word")
    browser.find_element("id", "stop").click()
    wait(lambda: "(stopped)" in text(browser, "answer"))
    wait(lambda: jobs.running is None)
    clerk.close()
    assert jobs.recent(1)[0].state == "cancelled"


def test_a_failure_is_shown_in_words(browser: Any, page: Callable[[], Appliance], jobs: Jobs) -> None:
    page()
    for _ in range(8):
        jobs.submit(_waiting())
    browser.find_element("id", "text").send_keys("one too many\n")
    wait(lambda: "jobs are waiting already" in text(browser, "answer"))


def test_the_drawer_shows_the_figures(browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    one = page()
    browser.find_element("css selector", "summary").click()
    wait(lambda: "tokens/s" in text(browser, "figures"))
    assert "2.00" in text(browser, "figures") and "25 %" in text(browser, "figures")
    one.mute(True)
    wait(lambda: "muted" in text(browser, "phase"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser: Any, page: Callable[[], Appliance], scheme: str) -> None:
    """Ink and paper differ by a contrast of 7 or more (WCAG 2.2, 1.4.6)."""
    page()
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    time.sleep(0.1)
    colours = [
        browser.execute_script(f"return getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    ]
    bright, dim = sorted((_luminance(c) for c in colours), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 7


def _luminance(colour: str) -> float:
    parts = [int(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _waiting() -> Any:
    from tests.daemon.clerk import request

    return request()
