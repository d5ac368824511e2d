"""A closed-loop load over raw sockets, for machines without wrk; it needs only Python.

Each connection sends its next request when it has received the previous response. Several processes share
the connections, since one core of Python sends at most about 15,000 requests per second.
"""

import argparse
import json
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CLIENTS_A_PROCESS = 32
TIMEOUT_SECONDS = 60.0


def measure(url: str, bodies: Path, clients: int, seconds: float, processes: int) -> dict[str, float]:
    """The clients' results, named as in load.lua, and the number of cores that this generator used."""
    processes = max(1, min(processes, -(-clients // CLIENTS_A_PROCESS)))
    shares = [clients // processes + (number < clients % processes) for number in range(processes)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(Path(__file__)), url, str(bodies), str(seconds)]
    running = [
        subprocess.Popen([*command, str(share), str(number)], stdout=subprocess.PIPE, text=True)
        for number, share in enumerate(shares)
    ]
    results = [json.loads(process.communicate()[0]) for process in running]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    latencies = sorted(latency for result in results for latency in result["latencies"])
    statuses: dict[str, int] = {}
    for result in results:
        for status, count in result["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    took = max(result["seconds"] for result in results)
    return {
        "requests": len(latencies),
        "seconds": took,
        "bytes": sum(result["bytes"] for result in results),
        "p50_ms": 1e3 * statistics.median(latencies) if latencies else float("nan"),
        "p99_ms": 1e3 * latencies[int(0.99 * (len(latencies) - 1))] if latencies else float("nan"),
        "errors": sum(statuses.values()) - statuses.get("200", 0),
        "generator_cores": used / took,
    }


@dataclass
class Connection:
    """One client: its socket, the time of its last request, and what it has received of the response."""

    socket: socket.socket
    turn: int
    asked: float = 0.0
    answer: bytearray = field(default_factory=bytearray)
    length: int = -1


def requests_of(url: str, bodies: Path) -> tuple[tuple[str, int], list[bytes]]:
    """The server's address, and a request for each body, one a line of the file."""
    place = urlsplit(url)
    head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    return (place.hostname or "", place.port or 80), [
        f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for body in bodies.read_bytes().split(b"\n")
    ]


class Load:
    """The connections of this process."""

    def __init__(self, url: str, bodies: Path, clients: int, number: int) -> None:
        self._address, self._requests = requests_of(url, bodies)
        self._clients, self._number = clients, number
        self.latencies: list[float] = []
        self.statuses: dict[str, int] = {}
        self.bytes = 0

    def run(self, seconds: float) -> float:
        """Send requests until the time is up, and wait for the last responses; returns the time it took."""
        selector = selectors.DefaultSelector()
        for number in range(self._clients):
            # Each client starts at another text, so that they do not send the same texts together.
            turn = (self._number * self._clients + number) * 7
            connection = Connection(self._connect(), turn)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        began = time.perf_counter()
        for key in list(selector.get_map().values()):
            self._ask(key.data)
        while selector.get_map():
            ready = selector.select(TIMEOUT_SECONDS)
            if not ready:
                self._count("timeout", len(selector.get_map()))
                break
            for key, _ in ready:
                connection = key.data
                try:
                    if not self._read(connection):
                        continue
                except ConnectionError:
                    self._count("closed", 1)
                    connection.answer.clear()
                    connection.length = -1
                    selector.unregister(connection.socket)
                    connection.socket = self._connect()
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
                if time.perf_counter() - began < seconds:
                    self._ask(connection)
                else:
                    selector.unregister(connection.socket)
        return time.perf_counter() - began

    def _connect(self) -> socket.socket:
        connected = socket.create_connection(self._address, TIMEOUT_SECONDS)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connected

    def _ask(self, connection: Connection) -> None:
        request = self._requests[connection.turn % len(self._requests)]
        connection.turn += 1
        connection.asked = time.perf_counter()
        connection.socket.sendall(request)

    def _read(self, connection: Connection) -> bool:
        """Receive a chunk; returns whether the response is complete."""
        chunk = connection.socket.recv(1 << 20)
        if not chunk:
            raise ConnectionResetError
        answer = connection.answer
        answer += chunk
        if connection.length < 0:
            end = answer.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = answer[:end].lower()
            place = head.index(b"content-length:") + 15
            connection.length = end + 4 + int(head[place:].partition(b"\r")[0])
        if len(answer) < connection.length:
            return False
        self.latencies.append(time.perf_counter() - connection.asked)
        self._count(answer[9:12].decode(), 1)
        self.bytes += len(answer)
        answer.clear()
        connection.length = -1
        return True

    def _count(self, status: str, count: int) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path, help="file with one body per line")
    parser.add_argument("seconds", type=float)
    parser.add_argument("clients", type=int)
    parser.add_argument("number", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    load = Load(arguments.url, arguments.bodies, arguments.clients, arguments.number)
    seconds = load.run(arguments.seconds)
    result: dict[str, Any] = {"seconds": seconds, "bytes": load.bytes}
    print(json.dumps(result | {"statuses": load.statuses, "latencies": load.latencies}))


if __name__ == "__main__":
    main()
