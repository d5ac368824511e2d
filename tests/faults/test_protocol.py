"""Hostile clients, without nginx: smuggling, floods of headers, slow clients and clients that never close."""

import contextlib
import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from tests.reliability import record
from tests.service import wait_until

BODY = b'{"texts": "hello"}'
HOST = b"POST /embed HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HIDDEN = b"0\r\n\r\nGET /info HTTP/1.1\r\nHost: x\r\n\r\n"

REFUSED = {
    "both Content-Length and Transfer-Encoding": HOST + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n" + HIDDEN,
    "two different Content-Lengths": HOST + b"Content-Length: 18\r\nContent-Length: 5\r\n\r\n" + BODY,
    "two different Content-Types": HOST
    + b"Content-Type: application/json\r\nContent-Type: text/plain\r\nContent-Length: 18\r\n\r\n"
    + BODY,
    "a second Host": HOST + b"Host: x\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a Transfer-Encoding twice": HOST + CHUNKED + CHUNKED + b"\r\n" + HIDDEN,
    "a list as Content-Length": HOST + b"Content-Length: 18, 18\r\n\r\n" + BODY,
    "a signed Content-Length": HOST + b"Content-Length: +18\r\n\r\n" + BODY,
    "a hexadecimal Content-Length": HOST + b"Content-Length: 0x12\r\n\r\n" + BODY,
    "two Transfer-Encodings": HOST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + HIDDEN,
    "an unknown Transfer-Encoding": HOST + b"Transfer-Encoding: xchunked\r\n\r\n" + HIDDEN,
    "a folded header": HOST + b"X-A: one\r\n two\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a space before the colon": HOST + b"Content-Length : 18\r\n\r\n" + BODY,
    "a tab in Transfer-Encoding": HOST + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + HIDDEN,
    "a bare line feed": HOST + b"X-A: b\nContent-Length: 18\r\n\r\n" + BODY,
    "a bare carriage return": HOST + b"X-A: b\rc\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a null byte in a header": HOST + b"X-A: b\x00c\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a header without a name": HOST + b": b\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a malformed chunk size": HOST + CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a negative chunk size": HOST + CHUNKED + b"\r\n-2\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than it says": HOST + CHUNKED + b"\r\n2\r\n{}}}\r\n0\r\n\r\n",
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no path": b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    "two schemes": HOST + b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n",
    "an unknown expectation": HOST + b"Expect: nonsense\r\nContent-Length: 18\r\n\r\n" + BODY,
    "an unknown version": b"POST /embed HTTP/9.9\r\nHost: x\r\n\r\n",
}
FLOODS = {
    "10,000 headers": HOST + b"".join(b"X-%d: a\r\n" % n for n in range(10_000)) + b"\r\n",
    "a header of 1 MB": HOST + b"X-A: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "a path of 1 MB": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
}


def exchange(port: int, request: bytes, seconds: float = 60.0) -> bytes:
    """Send bytes and read until the service closes the connection, which it must do."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65536):
                received += data
    return received


def answered_in_json(received: bytes, name: str) -> None:
    """Assert that the response is a 4xx in the native format, with its request id."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), (name, received[:200])
    assert b"\r\nContent-Type: application/json" in head, (name, head)
    error = json.loads(body)
    assert error["error"] and error["error_type"] in ("validation", "not_found"), (name, error)
    assert f"\r\nX-Request-ID: {error['request_id']}".encode() in head, (name, head)


@pytest.mark.parametrize("header", [b"SCRIPT_NAME", b"Script-Name", b"PATH_INFO", b"Path-Info"])
def test_no_header_moves_the_path(service, header):
    """Not even from an address that gunicorn trusts, such as this one."""
    request = HOST + header + b": /emb\r\nConnection: close\r\nContent-Length: 18\r\n\r\n" + BODY
    assert exchange(service.port, request).startswith(b"HTTP/1.1 200")


def test_a_path_that_is_not_below_script_name_is_not_found(start_without_model):
    below = start_without_model(SCRIPT_NAME="/emb")

    def answered() -> bytes:
        with contextlib.suppress(ConnectionRefusedError):
            return exchange(below.port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        return b""

    received = wait_until(answered, "an answer")
    answered_in_json(received, "SCRIPT_NAME")
    assert received.startswith(b"HTTP/1.1 404 Not Found")
    assert requests.get(f"{below.url}/emb/health/live", timeout=60).status_code == 200


def test_ambiguous_requests_are_refused_and_the_connection_closed(service):
    for name, request in REFUSED.items():
        received = exchange(service.port, request)
        answered_in_json(received, name)
        assert received.count(b"Connection: ") == 1, (name, received)
        assert b"model_name" not in received, name
    assert service.post("/embed", {"texts": "hello"}).status_code == 200
    record(
        "request smuggling and malformed HTTP",
        "; ".join(REFUSED),
        len(REFUSED),
        "each refused with 400 or 417, in JSON, and the connection closed; no second request read",
    )


def test_floods_of_headers_are_refused(service):
    for name, request in FLOODS.items():
        received = exchange(service.port, request)
        assert received[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"HTTP/1.1 414"), (name, received[:100])
    assert service.post("/embed", {"texts": "hello"}).status_code == 200
    record("floods of headers", "; ".join(FLOODS), len(FLOODS), "each refused with 431, 414 or 400")


@pytest.mark.slow
def test_200_unfinished_requests_are_cut_off(service):
    """Half of them stall in the headers and half in the body; each sends a byte per second, for ever."""
    stalled = []
    began = time.monotonic()
    for number in range(200):
        sock = socket.create_connection(("127.0.0.1", service.port), timeout=60)
        head = HOST + (b"Content-Length: 100\r\n\r\n{" if number % 2 else b"X-Slow: a")
        sock.sendall(head)
        sock.setblocking(False)
        stalled.append(sock)
    open_ones = list(stalled)
    dripped = began

    def all_cut_off() -> bool:
        nonlocal dripped
        drip, now = False, time.monotonic()
        if now - dripped > 1:
            drip, dripped = True, now
        for sock in list(open_ones):
            try:
                if drip:
                    sock.send(b"a")
                if not sock.recv(65536):
                    open_ones.remove(sock)
            except BlockingIOError:
                pass
            except OSError:
                open_ones.remove(sock)
        return not open_ones

    wait_until(all_cut_off, "the end of every half-sent request")
    freed = time.monotonic() - began
    answered = time.monotonic()
    assert requests.get(f"{service.url}/health", timeout=60).status_code == 200
    took = time.monotonic() - answered
    for sock in stalled:
        sock.close()
    record(
        "slow-loris on the bare port",
        "200 half-sent requests that send one byte per second",
        200,
        f"all cut off after {freed:.1f} s; /health then in {took * 1e3:.0f} ms",
    )


def test_silent_connections_block_nobody(service):
    """Many connections never send anything, while other clients are served."""
    silent = [socket.create_connection(("127.0.0.1", service.port), timeout=60) for _ in range(300)]
    began = time.monotonic()
    assert service.post("/embed", {"texts": "hello"}).status_code == 200
    took = time.monotonic() - began
    for sock in silent:
        sock.close()
    record(
        "silent connections", "300 connections that send nothing", 300, f"a request among them: {took:.2f} s"
    )


def test_clients_that_never_close_delay_nobody(service):
    """They request that the connection is closed but keep it open; accepting must not wait for them."""
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    stay = [socket.create_connection(("127.0.0.1", service.port), timeout=60) for _ in range(20)]
    for sock in stay:
        sock.sendall(request)
    for sock in stay:
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    # If each of them held the worker for a second, this would take too long.
    assert requests.get(f"{service.url}/health", timeout=60).status_code == 200
    for sock in stay:
        sock.close()


@pytest.mark.slow
def test_a_slow_but_honest_upload_is_served(service):
    """2 MB at 250 kB/s take longer than a stalled request may."""
    body = b'{"texts": "hello"' + b" " * 2_000_000 + b"}"
    head = HOST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as sock:
        sock.sendall(head)
        for start in range(0, len(body), 50_000):
            time.sleep(0.2)
            sock.sendall(body[start : start + 50_000])
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_a_client_that_sends_an_oversized_body_still_gets_its_error(service, chunked):
    body = b'{"texts": "' + b"a" * (32 << 20) + b'"}'
    pieces = (body[start : start + (1 << 20)] for start in range(0, len(body), 1 << 20))
    response = requests.post(f"{service.url}/embed", data=pieces if chunked else body, timeout=60)
    assert response.status_code == 413
    assert response.json()["error_type"] == "too_large"
    record(
        f"body over the limit, {'chunked' if chunked else 'with Content-Length'}",
        "slightly over 32 MiB",
        1,
        "413 JSON",
    )


def test_a_response_announces_that_the_connection_will_close(service):
    """A large body that was rejected unread ends the connection; after keep-alive it stays open."""
    large, small = b"x" * 500_000, b"x" * 1000
    compressed = {"Content-Encoding": "br"}
    with requests.Session() as session:
        for sent, kept in ((large, False), (small, True), (iter([small]), False), (large, False)):
            refused = session.post(f"{service.url}/embed", data=sent, headers=compressed, timeout=60)
            assert refused.status_code == 415
            assert refused.headers["Connection"] == ("keep-alive" if kept else "close")
            for _ in range(3):
                answered = session.post(f"{service.url}/embed", data=BODY, timeout=60)
                assert answered.status_code == 200
                assert answered.headers["Connection"] == "keep-alive"


UNFINISHED = {
    "headers": HOST,
    "no body": HOST + b"Content-Length: 18\r\n\r\n",
    "half a body": HOST + b"Content-Length: 18\r\n\r\n" + BODY[:9],
    "half a large body": HOST + b"Content-Length: 400000\r\n\r\n" + b" " * 100_000,
    "half a chunk": HOST + CHUNKED + b"\r\n12\r\n" + BODY[:9],
}


@pytest.mark.slow
def test_a_request_that_is_never_finished_gets_a_408(service):
    """Meanwhile a connection that has never been used stays open for a first request."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as unused:
        with ThreadPoolExecutor(len(UNFINISHED)) as clients:
            answers = list(clients.map(lambda sent: exchange(service.port, sent), UNFINISHED.values()))
        for name, answer in zip(UNFINISHED, answers, strict=True):
            assert answer.lower().startswith(b"http/1.1 408 request timeout\r\n"), name
            assert b"\r\nConnection: close\r\n" in answer, name
            body = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert (body["error"], body["error_type"]) == ("the request did not arrive in time", "timeout")
        unused.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert unused.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Type: application/json\r\ncontent-type:application/json\r\n",
        b"Content-Length: 18\r\n",
        b"X-Request-ID: mine\r\nX-Request-ID: mine\r\n",
    ],
    ids=["Content-Type", "Content-Length", "X-Request-ID"],
)
def test_a_header_that_is_repeated_in_the_same_words_counts_once(service, header):
    answer = exchange(service.port, HOST + header + b"Content-Length: 18\r\nConnection: close\r\n\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 200")
    assert (b"X-Request-ID: mine\r\n" in answer) == (b"mine" in header)


def test_with_all_connections_taken_the_longest_idle_one_makes_room(start_without_model):
    """A refusal below Flask also tells the browser of an allowed page that the page may read it."""
    command = [sys.executable, "-m", "gunicorn", "--worker-connections", "8"]
    command += ["-b", "127.0.0.1:{port}", "app:app"]
    service = start_without_model(
        command, CORS_ORIGINS="http://localhost:*", KEEP_ALIVE_SECONDS="600"
    ).wait_ready()
    live = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(8):
            idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 60)))
            idle[-1].sendall(live)
            assert b"Connection: " in idle[-1].recv(65536)
        for _ in range(20):
            assert service.post("/embed", {"texts": "hello"}).status_code == 200
        assert idle[0].recv(100) == b""
    wait_until(lambda: "All 8 connections are taken" in service.log(), "the line in the log")
    flood = live.replace(b"\r\n\r\n", b"\r\nOrigin: %b\r\nX-A: " + b"a" * 10_000 + b"\r\n\r\n")
    for origin, allowed in ((b"http://localhost:5173", True), (b"http://other.example", False)):
        refused = exchange(service.port, flood.replace(b"%b", origin))
        assert refused.startswith(b"HTTP/1.1 431")
        assert (b"\r\nAccess-Control-Allow-Origin: " + origin in refused) == allowed


def test_a_web_worker_without_descriptors_waits_and_serves_again(start_without_model):
    service = start_without_model().wait_ready()
    [worker] = service.web_workers()
    limit = worker.num_fds() + 5
    worker.rlimit(psutil.RLIMIT_NOFILE, (limit, limit))
    held = [socket.create_connection(("127.0.0.1", service.port), timeout=60) for _ in range(30)]
    wait_until(lambda: "Cannot accept connections: Too many open files" in service.log())
    for sock in held:
        sock.close()
    assert service.post("/embed", {"texts": "hello"}).status_code == 200
    assert worker.is_running()


def test_a_worker_that_reaches_max_requests_is_replaced_without_loss(start_without_model):
    command = [sys.executable, "-m", "gunicorn", "--max-requests", "40", "-b", "127.0.0.1:{port}", "app:app"]
    service = start_without_model(command).wait_ready()
    [first] = service.web_workers()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda n: service.post("/embed", {"texts": f"text {n}"}), range(150)))
    assert {answer.status_code for answer in answers} == {200}
    wait_until(lambda: not first.is_running(), "the end of the first worker")
