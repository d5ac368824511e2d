"""With the shipped nginx files, another server answers /rerank, and the service everything else."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests

from tests.deploy.nginx import Nginx
from tests.service import ROOT, free_port

FRAGMENT = ROOT / "deploy" / "nginx-locations" / "reranker.conf"
BODY = {"query": "q", "texts": ["a", "b"]}


class Reranker(BaseHTTPRequestHandler):
    """Answers as Text Embeddings Inference does, and repeats the request's id."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("x-seen-id", self.headers["X-Request-ID"])
        self.end_headers()
        self.wfile.write(b'[{"index":1,"score":0.9},{"index":0,"score":0.1}]')

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def front(service, tmp_path):
    started = []

    def start(port: int) -> Nginx:
        folder = tmp_path / "locations"
        folder.mkdir()
        text = FRAGMENT.read_text().replace("http://reranker:80", f"http://127.0.0.1:{port}")
        (folder / FRAGMENT.name).write_text(text)
        started.append(Nginx(tmp_path, [service.port]))
        return started[0]

    yield start
    started[0].stop()


def post(front: Nginx, path: str, body: object) -> requests.Response:
    headers = {"X-Request-ID": "one"}
    return requests.post(front.url + path, json=body, verify=front.certificate, headers=headers, timeout=60)


def test_a_reranker_answers_its_route_only(front, service):
    with HTTPServer(("127.0.0.1", 0), Reranker) as reranker:
        threading.Thread(target=reranker.serve_forever, daemon=True).start()
        nginx = front(reranker.server_port)
        ranked = post(nginx, "/rerank", BODY)
        assert [each["index"] for each in ranked.json()] == [1, 0]
        assert ranked.headers["x-seen-id"] == "one"
        assert post(nginx, "/embed", {"texts": "a"}).json()["count"] == 1
        reranker.shutdown()


def test_without_it_the_service_says_that_it_does_not_rerank(front, service):
    refused = post(front(free_port()), "/rerank", BODY)
    assert refused.status_code == 404
    assert "does not rerank" in refused.json()["error"]
