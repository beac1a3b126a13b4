"""The kiosk in a real browser: Chromium without a screen, clicked and typed at, over a queue with a clerk."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from device import kiosk
from device.appliance import Appliance
from flashd.daemon.api import Api
from flashd.daemon.job import Job
from flashd.daemon.jobs import Jobs
from flashd.daemon.server import Server
from tests.daemon.fake_worker import Clerk, request
from tests.waiting import wait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1024,600",
)  # fmt: skip
SETTINGS = """
kiosk: {title: Greenhouse, presets: ["Is it warm?", "<b>Bold?</b>"]}
sensors: [{kind: ds18b20, name: soil_heat}, {kind: iio, name: air, device: bme280, channel: temp}]
"""
SMALL = (800, 480)
"""The Raspberry Pi's own touch screen."""


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
        thermometer = tmp_path / "bus/w1/devices/28-0123456789ab"
        thermometer.mkdir(parents=True)
        (thermometer / "w1_slave").write_text("5c 01 4b 46 7f ff 04 10 a1 : crc=a1 YES\nt=21750\n")
        zone = tmp_path / "class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "temp").write_text("48312\n")
        one = appliance(SETTINGS, sysfs=tmp_path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = Server(tmp_path / "api.sock", port)
        servers.append(server)

        def start(name: str) -> Job:
            raise KeyError(name)

        routes = Api(jobs, "a model", one.status, start, lambda: b"", lambda asked: asked)
        server.start(routes.application([*kiosk.routes(one)]))
        browser.get(f"http://127.0.0.1:{port}/")
        return one

    yield open_page
    for server in servers:
        server.stop()
        server.close()


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text).strip()


@contextmanager
def small(browser: Any) -> Iterator[None]:
    """A touch screen of 800 by 480 points."""
    size = {"width": SMALL[0], "height": SMALL[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def touch(browser: Any, what: Any) -> None:
    """A finger on an element, or on what a selector finds."""
    element = browser.find_element("css selector", what) if isinstance(what, str) else what
    box = element.rect
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def keys(browser: Any) -> dict[str, Any]:
    """The keys on the screen, by what is written on them."""
    return {key.text: key for key in browser.find_elements("css selector", "#keys button") if key.is_displayed()}


def plot(browser: Any, name: str) -> str:
    """The points of a figure's line."""
    line = browser.find_elements("css selector", f"svg[aria-label^='{name}'] polyline")
    return line[0].get_attribute("points") if line else ""


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
    wait(browser.find_element("id", "again").is_displayed)
    browser.find_element("id", "again").click()
    assert buttons(browser)[0].is_displayed()
    assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def test_a_question_is_typed_and_the_talk_goes_on(browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    page()
    for question in ("Why?", "And then?"):
        wait(lambda: browser.find_element("id", "ask").is_enabled())
        browser.find_element("id", "text").send_keys(question + "\n")
        wait(lambda q=question: text(browser, "question") == q and text(browser, "answer") == "It is warm today.")  # type: ignore[misc]
    wait(lambda: len(clerk.answered) == 2)
    assert [t.content for t in clerk.answered[1].request.turns] == ["Why?", "It is warm today.", "And then?"]


@pytest.mark.parametrize("how", ["New", "left alone"])
def test_whoever_comes_next_begins_anew(how: str, browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    page()
    browser.find_element("id", "text").send_keys("My secret?\n")
    wait(browser.find_element("id", "again").is_displayed)
    if how == "New":
        browser.find_element("id", "again").click()
    else:
        browser.execute_script("touched -= LEFT_ALONE")
    wait(lambda: not browser.find_element("id", "talk").is_displayed())
    browser.find_element("id", "text").send_keys("Who are you?\n")
    wait(lambda: len(clerk.answered) == 2)
    assert [t.content for t in clerk.answered[1].request.turns] == ["Who are you?"]


def test_a_question_is_typed_by_touch_alone(browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    page()
    with small(browser):
        touch(browser, "#text")
        wait(lambda: len(keys(browser)) > 40)
        for name in ("⇧", "W", "h", "x", "Delete", "y", "space", "ü", "?"):
            touch(browser, f"#keys [aria-label='{name}']" if name == "Delete" else keys(browser)[name])
        assert browser.find_element("id", "text").get_property("value") == "Why ü?"
        targets = browser.find_elements("css selector", "button")
        for each in [t for t in targets if t.is_displayed()]:
            size, place = each.size, each.location
            assert min(size.values()) >= 44, (each.text, size)  # WCAG 2.2, 2.5.5
            assert place["x"] + size["width"] <= SMALL[0] and place["y"] + size["height"] <= SMALL[1], each.text
        touch(browser, keys(browser)["Ask"])
        wait(lambda: clerk.answered)
        assert clerk.answered[0].request.turns[0].content == "Why ü?"
        wait(lambda: not keys(browser))


def test_what_is_sensed_now_is_on_the_page(browser: Any, page: Callable[[], Appliance], tmp_path: Path) -> None:
    page()
    wait(lambda: text(browser, "senses") == "soil heat 21.75 °C\nair unknown")
    thermometer = tmp_path / "bus/w1/devices/28-0123456789ab/w1_slave"
    thermometer.write_text("f8 ff 4b 46 7f ff 08 10 e8 : crc=e8 YES\nt=-500\n")
    wait(lambda: "soil heat -0.5 °C" in text(browser, "senses"))


def test_a_long_answer_is_followed_to_its_end(browser: Any, page: Callable[[], Appliance], jobs: Jobs) -> None:
    page()
    with small(browser):
        clerk = Clerk(jobs, words=["a row\n"] * 60)
        browser.find_element("id", "text").send_keys("talk\n")
        wait(lambda: text(browser, "answer").count("row") == 60)
        left = browser.execute_script(
            "const m = document.getElementById('main'); return m.scrollHeight - m.scrollTop - m.clientHeight"
        )
        clerk.close()
    assert left < 80


def test_who_waits_is_told_why(browser: Any, page: Callable[[], Appliance], jobs: Jobs) -> None:
    page()
    for _ in range(2):
        jobs.submit(request(priority=9))
    browser.find_element("id", "text").send_keys("when?\n")
    wait(lambda: text(browser, "answer") == "… waiting, 2 before this")
    clerk = Clerk(jobs, paced=True)
    assert clerk.permits is not None
    clerk.permits.release(3)
    wait(lambda: text(browser, "answer") == "… waiting, 1 before this")
    clerk.permits.release(3)
    wait(lambda: [j.request.source for j in jobs.running] == ["api"])
    (running,) = jobs.running
    jobs.progress(running, 7, 28, 130 << 20)
    wait(lambda: text(browser, "answer") == "… thinking, layer 7 of 28, 130 MiB read")
    clerk.close()


def test_an_answer_streams_and_is_stopped(browser: Any, page: Callable[[], Appliance], jobs: Jobs) -> None:
    page()
    clerk = Clerk(jobs, words=["word "] * 50, paced=True)
    assert clerk.permits is not None
    browser.find_element("id", "text").send_keys("talk\n")
    clerk.permits.release(2)
    wait(lambda: text(browser, "answer") == "word word")
    browser.find_element("id", "stop").click()
    wait(lambda: "(stopped)" in text(browser, "answer"))
    wait(lambda: not jobs.running)
    clerk.close()
    assert jobs.recent(1)[0].state == "cancelled"


def test_a_failure_is_shown_in_words(browser: Any, page: Callable[[], Appliance], jobs: Jobs) -> None:
    page()
    for _ in range(8):
        jobs.submit(request())
    browser.find_element("id", "text").send_keys("one too many\n")
    wait(lambda: "no room for another job: 8 waiting" in text(browser, "answer"))


def test_the_drawer_shows_the_figures(browser: Any, page: Callable[[], Appliance], clerk: Clerk) -> None:
    one = page()
    browser.find_element("id", "status").click()
    wait(lambda: "tokens/s" in text(browser, "figures"))
    shown = text(browser, "figures").replace("\n", " ")
    for words in (
        "tokens/s 2.00", "card MiB/token 3.0", "found in RAM 25 %", "processor 48 °C", "throttled no", "name a model",
    ):  # fmt: skip
        assert words in shown, shown
    # the temperature is taken every two seconds: its plot runs along the top, since it is its own maximum
    wait(lambda: plot(browser, "processor").startswith("0,1 "), 20)
    browser.find_element("id", "mute").click()
    wait(lambda: one.muted and "muted" in text(browser, "phase"))
    browser.find_element("id", "shut").click()
    assert not browser.find_element("id", "drawer").is_displayed()


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
