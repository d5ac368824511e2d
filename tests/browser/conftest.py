"""A real Chromium, and a service whose engine does what a test asks of it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flask import Flask, request
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.remote.webdriver import WebDriver
from werkzeug.serving import make_server

from embedding_service.engine import Embeddings, EmbedRequest, ModelInfo, Status, Timings
from embedding_service.errors import ServiceError, Unauthorized
from embedding_service.web.factory import create_app
from embedding_service.web.settings import WebSettings
from tests.conftest import require_program

INFO = ModelInfo(
    model_name="example/model",
    origin="local folder",
    revision=None,
    embedding_dimension=4,
    max_seq_length=16,
    device="cuda",
    dtype="float16",
    backend="torch",
    pooling="mean",
    prompts={},
    batch_size=32,
    max_batch_tokens=512,
    fingerprint="0",
)

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


class ScriptedEngine:
    """Answers with the state, the error or the truncation that a test sets on it."""

    def __init__(self) -> None:
        self.state = Status(state="healthy", info=INFO)
        self.error: ServiceError | None = None
        self.truncated: list[int] = []

    def embed(self, embed_request: EmbedRequest) -> Embeddings:
        if self.error is not None:
            raise self.error
        vectors = np.eye(4, dtype=np.float32)[np.arange(len(embed_request.texts)) % 4]
        return Embeddings(vectors=vectors, tokens=7, truncated=self.truncated, timings=Timings())

    def status(self) -> Status:
        return self.state

    def must_restart(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Scripted:
    """The real Flask app over a ScriptedEngine, on a real port."""

    def __init__(self, prepare: Callable[[Flask], None] = lambda _app: None) -> None:
        self.engine = ScriptedEngine()
        app = create_app(self.engine, WebSettings())
        prepare(app)
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    running = Scripted()
    yield running
    running.stop()


@pytest.fixture
def guarded() -> Iterator[Scripted]:
    """The same behind the key `open sesame`."""

    def ask_for_key(app: Flask) -> None:
        @app.before_request
        def check() -> None:
            is_open = request.path.startswith(("/health", "/static/")) or request.path == "/"
            if not is_open and request.headers.get("Authorization") != "Bearer open sesame":
                raise Unauthorized("send an API key")

    running = Scripted(ask_for_key)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """One Chromium for the session, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = require_program("chromium", "chromium")
    profile: Path = tmp_path_factory.mktemp("chromium")
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver is named, so that selenium never looks for one elsewhere.
    driver = webdriver.Chrome(options, Driver(require_program("chromedriver", "chromium-driver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: WebDriver) -> Iterator[WebDriver]:
    """The Chromium with nothing left of the test before, in the light, 1280 pixels wide."""
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    if chromium.current_url.startswith("http"):
        chromium.execute_script("sessionStorage.clear()")
