"""A photograph of the kiosk's page with the demo's board on it, taken by Chromium without a screen."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1024, 768
"""A common touch screen, on which two answers find room."""

COLOURS = 32
"""Of the picture, which is small so."""

ANSWER_SECONDS = 180.0
LOOK_SECONDS = 0.1
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--window-size={WIDTH},{HEIGHT}")


def photograph(address: str, path: Path) -> None:
    """Presses the demo's button, opens its door, and writes a PNG of both answers and what the decision drives."""
    from PIL import Image
    from selenium import webdriver
    from selenium.common.exceptions import NoSuchElementException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def ended(turns: int) -> Callable[[Any], bool]:
        """So many questions are answered, and no more is asked."""

        def is_so(page: Any) -> bool:
            done = page.find_elements(By.CSS_SELECTOR, ".turn:not([aria-busy])")
            return len(done) == turns and page.find_element(By.TAG_NAME, "body").get_attribute("data-phase") == "idle"

        return is_so

    def touch(name: str) -> Callable[[Any], Any]:
        return lambda page: page.find_element(By.CSS_SELECTOR, f".part button[aria-label='{name}']")

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(address)
        wait = WebDriverWait(browser, ANSWER_SECONDS, LOOK_SECONDS, [NoSuchElementException])
        wait.until(touch("Press button 17")).click()
        wait.until(ended(1))
        wait.until(touch("Open door 27")).click()
        wait.until(ended(2))
        browser.execute_script("document.querySelector('.turn').scrollIntoView()")
        photograph = browser.get_screenshot_as_png()
    finally:
        browser.quit()
    with Image.open(io.BytesIO(photograph)) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
