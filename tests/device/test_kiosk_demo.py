"""The demo's board on the page: drawn as it is, and pressed there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.kiosk_page import NEEDED, Page, opened
from tests.device.test_kiosk_looks import SIZES, assess, axe
from tests.device.tried_demo import Tried, tried
from tests.waiting import wait

__all__ = ["axe", "tried"]  # fixtures

pytestmark = NEEDED


@pytest.fixture
def shown(browser: Any, tried: Tried, jobs: Jobs, tmp_path: Path) -> Iterator[Page]:
    yield from opened(browser, tried.appliance, jobs, tmp_path, tried.routes)


def part(page: Page, label: str) -> str:
    """A part's word, or "" if there is none of that name."""
    words = page.run("return [...document.querySelectorAll('.part')].map(e => [e.innerText, e.dataset.on])")
    return next((text.split("\n")[0].strip() + f" {on}" for text, on in words if text.startswith(label)), "")


def touch(page: Page, name: str) -> None:
    page.find(f".part button[aria-label='{name}']").click()


def test_the_board_is_drawn_and_pressed_on_the_page(shown: Page, jobs: Jobs, axe: str) -> None:
    clerk = Clerk(jobs, words=("yes",))
    wait(lambda: part(shown, "door 27").startswith("door 27 closed, "))
    assert part(shown, "pin 5").startswith("pin 5 off, ") and part(shown, "pin 5").endswith(" false")
    for size in SIZES:
        shown.resize(*size)
        for scheme in ("light", "dark"):
            shown.prefer(scheme)
            assess(shown, axe, f"{size}, {scheme}")
    touch(shown, "Press button 17")
    wait(lambda: part(shown, "button 17").startswith("button 17 pressed, "))
    wait(lambda: part(shown, "button 17").startswith("button 17 up, "))
    wait(lambda: shown.text(".asked").startswith("The button “front”: Say hello"))
    touch(shown, "Open door 27")
    wait(lambda: part(shown, "pin 5").startswith("pin 5 on, ") and part(shown, "pin 5").endswith(" of 5 s true"))
    colour = "return getComputedStyle(document.querySelector('.drive .bulb')).fill"
    lit = shown.run(colour)
    wait(lambda: part(shown, "pin 5").startswith("pin 5 off, "), 20)
    assert shown.run(colour) != lit
    clerk.close()


def test_a_page_of_a_real_board_draws_none(page: Page) -> None:
    wait(lambda: page.text("#state") == "Ready" and page.text("#title") == "Greenhouse")
    assert not page.all(".part")
    assert not [entry for entry in page.browser.get_log("browser") if "404" in entry["message"]]
