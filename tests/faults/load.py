"""Clients for the load tests, as light as possible since they share the machine's cores with the service."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import orjson

Reply = tuple[int, dict[str, str], bytes]


class Client:
    """One kept-alive connection."""

    def __init__(self, port: int, timeout: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def embed(self, body: bytes, path: str = "/embed") -> Reply:
        """POST a body; returns status, headers with lower-case names, and body."""
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()

    def close(self) -> None:
        self._connection.close()


@dataclass
class Seen:
    """The results of a load's clients: `latencies` of the 200s in seconds, `errors` the bodies of others."""

    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[bytes] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: str, latency: float, headers: dict[str, str], answer: bytes = b"") -> None:
        with self.lock:
            self.statuses[status] += 1
            if status == "200":
                self.latencies.append(latency)
            else:
                self.errors[answer] += 1
            if "retry-after-ms" in headers:
                self.waits.append(float(headers["retry-after-ms"]) / 1e3)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def body(texts: Sequence[str] | str) -> bytes:
    """The body of a native request."""
    return orjson.dumps({"texts": texts})


def closed_loop(
    port: int, clients: int, seconds: float, make: Callable[[int, int], bytes], limit: int | None = None
) -> Seen:
    """Run clients that send their next request once they have a response, up to a time or a number."""
    seen = Seen()
    until = time.monotonic() + seconds

    def run(number: int) -> None:
        client = Client(port)
        count = 0
        while time.monotonic() < until and (limit is None or count < limit):
            began = time.monotonic()
            try:
                status, headers, answer = client.embed(make(number, count))
                seen.note(str(status), time.monotonic() - began, headers, answer)
            except (OSError, http.client.HTTPException) as error:
                seen.note(type(error).__name__, 0.0, {})
                client.close()
            count += 1
        client.close()

    _all(clients, run, seen)
    return seen


def open_loop(
    port: int, per_second: float, seconds: float, clients: int, make: Callable[[int], bytes]
) -> Seen:
    """Send requests at a fixed rate, however slow the responses are, over a limited number of connections."""
    seen = Seen()
    began = time.monotonic()
    lock = threading.Lock()
    sent = 0

    def run(_number: int) -> None:
        nonlocal sent
        client = Client(port)
        while True:
            with lock:
                mine, sent = sent, sent + 1
            due = began + mine / per_second
            if due > began + seconds:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            sending = time.monotonic()
            try:
                status, headers, answer = client.embed(make(mine))
                seen.note(str(status), time.monotonic() - sending, headers, answer)
            except (OSError, http.client.HTTPException) as error:
                seen.note(type(error).__name__, 0.0, {})
                client.close()
        client.close()

    _all(clients, run, seen)
    return seen


def _all(clients: int, run: Callable[[int], None], seen: Seen) -> None:
    began = time.monotonic()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.seconds = time.monotonic() - began
