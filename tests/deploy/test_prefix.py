"""The pages, their files and the OpenAPI document work below a path that a proxy strips."""

import re
import socket
import ssl
from urllib.parse import urljoin

import pytest
import requests

from tests.deploy.nginx import Nginx

BODY = b'{"texts": "a"}'
SENT_THROUGH = {
    "both lengths": (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    "an unknown coding": (b"Transfer-Encoding: gzip\r\n\r\n", b"501"),
    "two schemes": (b"X-Forwarded-Ssl: off\r\nContent-Length: 14\r\n\r\n" + BODY, b"400"),
    "a script name": (b"Script-Name: /emb\r\nSCRIPT_NAME: /x\r\nContent-Length: 14\r\n\r\n" + BODY, b"200"),
}

LOCATIONS = """
        location /emb/ { proxy_pass http://embedding_service/; }
        location /told/ {
            proxy_set_header X-Forwarded-Prefix /told;
            proxy_pass http://embedding_service/;
        }
        location /health {"""


@pytest.fixture(scope="module")
def front(own_process, service, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx-prefix")
    nginx = Nginx(folder, [service.port], **{"\n        location /health {": LOCATIONS})
    yield nginx
    nginx.stop()


@pytest.mark.parametrize("prefix", ["/emb", "/told"])
@pytest.mark.parametrize("page", ["/", "/docs", "/docs/"])
def test_every_link_of_a_page_leads_somewhere(front: Nginx, prefix: str, page: str) -> None:
    def get(url: str) -> requests.Response:
        return requests.get(url, verify=front.certificate, timeout=60, allow_redirects=False)

    address = front.url + prefix + page
    shown = get(address)
    assert shown.status_code == 200
    links = re.findall(r'(?:href|src|data-document)="([^"#]+)"', shown.text)
    assert len(links) >= 4
    for link in links:
        target = urljoin(address, link)
        assert target.startswith(f"{front.url}{prefix}/"), link
        if not target.endswith("/metrics"):
            assert get(target).status_code == 200, target


@pytest.mark.parametrize("prefix", ["/emb", "/told"])
def test_the_address_in_the_document_serves(front: Nginx, prefix: str) -> None:
    document = f"{front.url}{prefix}/openapi.json"
    (server,) = requests.get(document, verify=front.certificate, timeout=60).json()["servers"]
    base = urljoin(document, server["url"])
    for path in ("embed", "/embed", "v1//embeddings"):
        body = {"texts": "a"} if "v1" not in path else {"input": "a"}
        answer = requests.post(
            base + path, json=body, verify=front.certificate, timeout=60, allow_redirects=False
        )
        assert answer.status_code == 200, (path, answer.text)


@pytest.mark.parametrize("case", SENT_THROUGH)
def test_errors_from_below_flask_pass_through_nginx(front: Nginx, case: str) -> None:
    """nginx refuses the first two itself; the others reach the service."""
    rest, status = SENT_THROUGH[case]
    context = ssl.create_default_context(cafile=front.certificate)
    with (
        socket.create_connection(("127.0.0.1", front.port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + rest)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.split(b" ", 2)[1] == status, received[:300]
    if case in ("two schemes", "a script name"):
        assert b"\r\nContent-Type: application/json" in received
