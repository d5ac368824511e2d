"""A page from another origin in a real Chromium can read responses only if CORS_ORIGINS names it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.fakes import FakeEngine, Served

FETCH = """
const done = arguments[1];
fetch(arguments[0] + "/embed", {
  method: "POST",
  headers: { "Content-Type": "application/json", Authorization: "Bearer secret" },
  body: JSON.stringify({ texts: ["one"] }),
}).then(
  async (answer) => done([answer.status, answer.headers.get("X-Request-ID") !== null, await answer.json()]),
  (error) => done(String(error)),
);
"""


class Empty(BaseHTTPRequestHandler):
    """An empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments) -> None:
        pass


@pytest.fixture
def other_origin() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_only_a_named_origin_can_read_the_response(browser, other_origin, named):
    origins = other_origin if named else "https://another.example"
    served = Served(FakeEngine(), cors_origins=origins, api_keys="secret")
    try:
        browser.get(other_origin)
        answer = browser.execute_async_script(FETCH, served.url)
    finally:
        served.stop()
    if named:
        assert answer[:2] == [200, True]
        assert answer[2]["embeddings"] == [[3.0, 0.0, 1.0]]
    else:
        assert answer == "TypeError: Failed to fetch"
