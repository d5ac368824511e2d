"""The shipped nginx.conf with the real nginx: TLS, limits, slow clients, and restarts that lose nothing."""

import contextlib
import socket
import ssl
from collections.abc import Iterator

import pytest
import requests

import config
from tests.deploy.load import Load
from tests.deploy.nginx import SHIPPED, Nginx
from tests.service import Service, free_port, wait_until

BODY_LIMIT = config.Config().max_body_bytes


@pytest.fixture(scope="module")
def front(own_process, service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    nginx = Nginx(tmp_path_factory.mktemp("nginx"), [service.port])
    yield nginx
    nginx.stop()


def ask(front: Nginx, method: str, path: str, **arguments) -> requests.Response:
    return requests.request(method, front.url + path, verify=front.certificate, timeout=60, **arguments)


def test_embeds_over_https(front: Nginx, oracle) -> None:
    response = ask(front, "POST", "/embed", json={"texts": ["one", "two"]}, headers={"X-Request-ID": "mine"})
    assert response.status_code == 200
    assert response.headers["X-Request-ID"] == "mine"
    wanted = oracle.encode(["one", "two"], normalize_embeddings=True)
    assert abs(wanted - response.json()["embeddings"]).max() < 1e-5
    wait_until(lambda: "id=mine" in front.access_log(), "the line in the log")


@pytest.mark.parametrize(
    ("version", "accepted"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_speaks_tls_1_2_and_1_3_only(front: Nginx, version: ssl.TLSVersion, accepted: bool) -> None:
    context = ssl.create_default_context(cafile=front.certificate)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", front.port)) as plain:
        if not accepted:
            with pytest.raises(ssl.SSLError, match="alert protocol version"):
                context.wrap_socket(plain, server_hostname="127.0.0.1")
        else:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                assert connection.version() == version.name.replace("TLSv1_", "TLSv1.")


def test_redirects_http_to_https(front: Nginx) -> None:
    response = requests.post(
        f"http://127.0.0.1:{front.plain_port}/embed?a=b", json={}, allow_redirects=False, timeout=60
    )
    assert response.status_code == 308
    assert response.headers["Location"] == "https://127.0.0.1/embed?a=b"


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "//metrics", "/%6Detrics", "/x/../metrics"])
def test_metrics_are_not_public(front: Nginx, path: str) -> None:
    with requests.Session() as session:
        request = requests.Request("GET", front.url).prepare()
        request.url = front.url + path
        response = session.send(request, verify=front.certificate, timeout=60)
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")
    line = f'"GET {"/metrics/" if path.endswith("s/") else "/metrics"}" 404'
    wait_until(lambda: line in front.access_log(), line)
    assert "upstream" not in response.text


def test_has_the_body_limit_of_the_service(front: Nginx) -> None:
    assert f"client_max_body_size {BODY_LIMIT >> 20}m;" in SHIPPED.read_text()
    body = b'{"texts": "' + b"a" * (BODY_LIMIT - 12)
    assert len(body) == BODY_LIMIT - 1
    at_limit = ask(front, "POST", "/embed", data=body + b'"')
    assert at_limit.json()["error_type"] == "validation", "the service itself must refuse this one"
    over = ask(front, "POST", "/embed", data=body + b'"}')
    assert (over.status_code, over.json()["error_type"]) == (413, "too_large")
    assert over.json()["request_id"]


def test_limits_the_rate_of_one_address(service: Service, start_nginx) -> None:
    """At a lower rate than the shipped one, which a busy machine might not reach."""
    front = start_nginx([service.port], **{"rate=100r/s": "rate=1r/s"})
    with requests.Session() as session:
        url, certificate = front.url + "/nowhere", front.certificate
        answers = [session.get(url, verify=certificate, timeout=60) for _ in range(300)]
    limited = [answer for answer in answers if answer.status_code == 429]
    assert limited and limited[0].json()["error_type"] == "overloaded"
    assert limited[0].headers["Retry-After"] == "1"
    assert answers[0].status_code == 404
    assert ask(front, "GET", "/health").status_code == 200


def test_says_in_json_that_no_instance_answers(start_nginx) -> None:
    front = start_nginx([free_port()])
    response = ask(front, "POST", "/embed", json={"texts": "one"}, headers={"X-Request-ID": 'bad"id'})
    assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")
    assert response.headers["Retry-After"] == "1"
    assert '"' not in response.json()["request_id"]


def test_two_hundred_slow_clients_delay_nobody(front: Nginx) -> None:
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\n"
    beginnings = [head, head + b"Content-Length: 10000\r\n\r\n" + b'{"texts": '] * 100
    context = ssl.create_default_context(cafile=front.certificate)
    slow = []
    for beginning in beginnings:
        plain = socket.create_connection(("127.0.0.1", front.port))
        slow.append(context.wrap_socket(plain, server_hostname="127.0.0.1"))
        slow[-1].sendall(beginning)
    seconds = sorted(ask(front, "GET", "/health").elapsed.total_seconds() for _ in range(40))
    assert ask(front, "POST", "/embed", json={"texts": "one"}).status_code == 200
    for connection in slow:
        connection.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert b" 200 " not in connection.recv(1000)
        connection.close()
    print(
        f"/health beside 200 slow clients: median {seconds[20] * 1e3:.1f} ms, p95 {seconds[37] * 1e3:.1f} ms"
    )


@pytest.mark.deploy
def test_a_rolling_restart_and_a_kill_lose_nothing(start_instance, start_nginx) -> None:
    instances = [start_instance(), start_instance()]
    front = start_nginx([instance.wait_ready().port for instance in instances])
    load = Load(front.url, front.certificate)
    try:
        for index, instance in enumerate(instances):
            assert instance.stop() == 0
            instances[index] = start_instance(instance.port).wait_ready()
        instances[0].kill()
        instances[0] = start_instance(instances[0].port).wait_ready()
        wait_until(lambda: load.answered >= 700 or load.failures, "700 answers", 600)
    finally:
        load.end()
    tries = sum(" to=" in line and ", " in line.split(" to=")[1] for line in front.access_log().splitlines())
    print(f"{load.answered} answers, {tries} of them at the second try, slowest {load.slowest_seconds:.2f} s")
    assert load.failures == []
    assert load.answered >= 700
    assert tries, "the restarts cannot have hit anything"
