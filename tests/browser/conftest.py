"""A real Chromium, and services whose engine is scripted by the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.service import Service as Driver

from tests.conftest import require_browser, require_program
from tests.fakes import FakeEngine, Served

# Not even Latin-1, which headers allow: it is sent as UTF-8.
KEY = "schlüssel 鍵"

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,960",
]


@pytest.fixture
def scripted() -> Iterator[Served]:
    """The app with an engine that is scripted by the test."""
    running = Served(FakeEngine())
    yield running
    running.stop()


@pytest.fixture
def guarded() -> Iterator[Served]:
    """The same, but it requires a key."""
    running = Served(FakeEngine(), api_keys=KEY)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def chromium(own_process: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One Chromium for the session, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = require_browser()
    profile: Path = tmp_path_factory.mktemp("chromium")
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver is given, so that selenium never looks for one elsewhere.
    driver = webdriver.Chrome(options, Driver(require_program("chromedriver", "chromium-driver")))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """The Chromium without traces of earlier tests, with light colours and 1280 pixels wide."""
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    if chromium.current_url.startswith("http"):
        chromium.execute_script("sessionStorage.clear()")
