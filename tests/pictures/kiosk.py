"""A photograph of the kiosk's page, taken by Chromium without a screen."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1024, 600
"""A common small touch screen."""

COLOURS = 32
"""Of the picture, which is small so."""

ANSWER_SECONDS = 180.0
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--window-size={WIDTH},{HEIGHT}")


def photograph(address: str, question: str, path: Path) -> None:
    """Asks one of the page's presets and writes a PNG of the answer."""
    from PIL import Image
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def preset(page: Any) -> Any:
        return next((b for b in page.find_elements(By.CSS_SELECTOR, "#presets button") if b.text == question), None)

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(address)
        wait = WebDriverWait(browser, ANSWER_SECONDS)
        wait.until(preset).click()
        wait.until(lambda page: page.find_element(By.ID, "again").is_displayed())  # so the answer is whole
        wait.until(lambda page: page.find_element(By.TAG_NAME, "body").get_attribute("data-phase") == "idle")
        photograph = browser.get_screenshot_as_png()
    finally:
        browser.quit()
    with Image.open(io.BytesIO(photograph)) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
