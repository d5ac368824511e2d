"""Writes docs/images from a service that runs: `python -m tests.browser.screenshots http://localhost:8001`."""

import io
import sys

# Pillow comes with llama-index.
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver

from tests.browser.conftest import FLAGS
from tests.browser.test_page import Page
from tests.conftest import require_browser, require_program
from tests.service import ROOT, wait_until

FOLDER = ROOT / "docs" / "images"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
QUESTION = "I cannot log in"
DOCUMENTS = """How do I reset my password?
The parcel arrived two days late.
My account is locked after three attempts.
Which plan includes phone support?
The sign-in page shows an error.
Can I change the delivery address?
We were charged twice for one order.
Where can I download my invoice?"""


def write(page: Page, name: str) -> None:
    """Save the whole page as a picture."""
    height = page.browser.execute_script("return document.documentElement.scrollHeight")
    page.resize(page.browser.execute_script("return innerWidth"), min(height, 4000))
    picture = Image.open(io.BytesIO(page.browser.get_screenshot_as_png()))
    # With 256 colours, which look the same, the file is less than half as large.
    few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(FOLDER / f"{name}.png", optimize=True)


def compare(page: Page, device: str) -> None:
    """The Compare tab with its example."""
    wait_until(page["map-card"].is_displayed, "the example")
    write(page, f"compare-{device}")


def search(page: Page, device: str) -> None:
    """The Search tab with results."""
    page["tab-search"].click()
    page["documents"].send_keys(DOCUMENTS)
    page["query"].send_keys(QUESTION)
    wait_until(lambda: page.count("#results li") > 4, "results")
    write(page, f"search-{device}")


def main(url: str) -> None:
    """Show both tabs on a desktop and on a phone."""
    options = webdriver.ChromeOptions()
    options.binary_location = require_browser()
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, Driver(require_program("chromedriver", "chromium-driver")))
    try:
        for device, (width, height) in SIZES.items():
            page = Page(browser, url)
            page.resize(width, height)
            compare(page, device)
            page.resize(width, height)
            search(page, device)
    finally:
        browser.quit()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8001")
