"""The kiosk's page in a real browser, Chromium without a screen, over a queue of jobs; and hands and eyes for it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from device import kiosk
from device.appliance import Appliance
from flashd.daemon.http.api import Api
from flashd.daemon.http.server import Server
from flashd.daemon.jobs import Jobs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDED = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1024,600", "--lang=en-US",
)  # fmt: skip
SETTINGS = """
kiosk: {title: Greenhouse, presets: ["Is it warm?", "<b>Bold?</b>"]}
sensors: [{kind: ds18b20, name: soil_heat}, {kind: iio, name: air, device: bme280, channel: temp}]
triggers:
  - {kind: button, name: front, pin: 17, prompt: "Say hello to the visitor."}
  - kind: door
    name: door
    pin: 27
    prompt: "Should the light be on?"
    choose: ["yes", "no"]
    drive: {pin: 5, answer: "yes", most: 4}
"""


class Page:
    """What a test does to the page and sees of it."""

    def __init__(self, browser: Any, appliance: Appliance, server: Server) -> None:
        self.browser, self.appliance, self.server = browser, appliance, server

    def text(self, selector: str) -> str:
        """The text of the last element that a selector finds, "" if there is none."""
        return str(
            self.run("return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText || ''", selector)
        ).strip()

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """The elements that a selector finds and a person sees."""
        script = "return [...document.querySelectorAll(arguments[0])].filter(each => each.checkVisibility())"
        return list(self.run(script, selector))

    def run(self, script: str, *values: object) -> Any:
        return self.browser.execute_script(script, *values)

    def ask(self, question: str) -> None:
        self.find("#text").send_keys(question + "\n")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """Light or dark."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def touch(self, what: Any) -> None:
        """A finger on an element, or on what a selector finds."""
        box = (self.find(what) if isinstance(what, str) else what).rect
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
        self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def start_browser(*more: str) -> Iterator[Any]:
    """A browser with flags beside the usual ones."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, *more):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from start_browser()


@pytest.fixture
def page(browser: Any, jobs: Jobs, appliance: Callable[..., Appliance], tmp_path: Path) -> Iterator[Page]:
    """The page over an appliance."""
    thermometer = tmp_path / "bus/w1/devices/28-0123456789ab"
    thermometer.mkdir(parents=True)
    (thermometer / "w1_slave").write_text("5c 01 4b 46 7f ff 04 10 a1 : crc=a1 YES\nt=21750\n")
    zone = tmp_path / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("48312\n")
    yield from opened(browser, appliance(SETTINGS, sysfs=tmp_path), jobs, tmp_path)


def opened(browser: Any, one: Appliance, jobs: Jobs, folder: Path, more: Sequence[Route] = ()) -> Iterator[Page]:
    """The page over an appliance, and more routes, until the test ends."""
    port = free_port()
    server = Server(folder / "api.sock", port)
    server.start(api_of(one, jobs).application([*kiosk.routes(one), *more]))
    browser.get(f"http://127.0.0.1:{port}/")
    yield Page(browser, one, server)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    jobs.close()
    server.stop()
    server.close()


def api_of(one: Appliance, jobs: Jobs) -> Api:
    """The API over an appliance that has no model."""
    return Api(jobs, "a model", one.status, one.start, lambda: b"", lambda asked, _: one.equipped(asked))


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
