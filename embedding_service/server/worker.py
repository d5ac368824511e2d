"""The gunicorn worker: a greenlet per connection, time limits for clients, and a lossless drain."""

import contextlib
import datetime
import errno
import functools
import os
import re
import time
import uuid
from http import HTTPStatus
from typing import Any

import gevent
import orjson
from gevent import monkey
from gevent import socket as gevent_socket
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn import util
from gunicorn.http import Request, RequestParser, errors, wsgi
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from embedding_service.observability import logs

# A request must arrive within READ_SECONDS plus the time that its bytes take at the minimum rate, and a
# response must be read within WRITE_SECONDS plus that time. This cuts off clients that are too slow, but not
# large bodies on slow lines.
READ_SECONDS, WRITE_SECONDS, MIN_BYTES_PER_SECOND = 6.0, 10.0, 50_000

# How long a stopping worker keeps idle connections open for requests that are already on their way.
LINGER_SECONDS = 2.0

# Time limit for requests in flight if the master is dead, when nothing else would end this process.
ORPHAN_SECONDS = 2.0

# How long to pause accepting connections after running out of file descriptors.
PAUSE_SECONDS = 0.5

MAX_BACKLOG = 2048

# How often the log says that all connections are taken.
FULL_LOG_SECONDS = 60.0

# An unread body up to this size is read and discarded, so that the connection can be reused.
MAX_DISCARDED_BYTES = 32_768

# Maximum number of large bodies in memory at once; other clients wait before they can send theirs.
LARGE_BODY_BYTES, MAX_LARGE_BODIES = 65_536, 128

ORIGIN = re.compile(rb"\r\norigin:[ \t]*([^\r\n]+?)[ \t]*\r\n", re.IGNORECASE)

# Responses to requests that never reach Flask, by gunicorn's error class; the first match counts.
REFUSALS = [
    ((errors.LimitRequestHeaders, errors.LimitRequestLine), 431, "too_large"),
    ((errors.ExpectationFailed,), 417, "validation"),
    ((errors.ForbiddenProxyRequest,), 403, "validation"),
    ((errors.InvalidResponseHeader, errors.InvalidResponseHeaderName), 500, "internal"),
    # A path that is not below the environment's SCRIPT_NAME.
    ((errors.ConfigurationProblem,), 404, "not_found"),
    ((errors.ParseException,), 400, "validation"),
    ((TimeoutError,), 408, "timeout"),
    ((Exception,), 500, "internal"),
]


class PatientSocket(gevent_socket.socket):  # type: ignore[misc]
    """A client's connection, which raises TimeoutError if the client sends or reads too slowly."""

    def expect(self, seconds: float) -> None:
        """Wait at most this long for the first byte of the next request; READ_SECONDS apply from then on."""
        self.first = b""
        self._read_by = time.monotonic() + seconds

    @property
    def begun(self) -> bool:
        """Whether any of the expected request has arrived; `first` is what arrived first."""
        return bool(self.first)

    def recv(self, size: int, flags: int = 0) -> bytes:
        # With a timeout of 0 gevent still returns data that has already arrived.
        self.timeout = max(0.0, self._read_by - time.monotonic())
        try:
            data: bytes = super().recv(size, flags)
        except BlockingIOError:
            raise TimeoutError("the client sends too slowly") from None
        if not self.first:
            self.first = data
            self._read_by = time.monotonic() + READ_SECONDS
        self._read_by += len(data) / MIN_BYTES_PER_SECOND
        return data

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send everything; for most responses one system call is enough."""
        view = memoryview(data)
        with contextlib.suppress(BlockingIOError):
            view = view[self._sock.send(view, flags) :]
        if view:
            self.timeout = WRITE_SECONDS + len(view) / MIN_BYTES_PER_SECOND
            super().sendall(view, flags)


class UnrepeatedRequest(Request):  # type: ignore[misc]
    """Gunicorn's request, which takes a header that is sent twice in the same words as sent once."""

    def parse_headers(self, data: bytes, from_trailer: bool = False) -> list[tuple[str, str]]:
        folded = data.lower().replace(b" ", b"").split(b"\r\n")
        if len(set(folded)) < len(folded):
            once: dict[tuple[bytes, bytes, int], bytes] = {}
            for number, line in enumerate(data.split(b"\r\n")):
                name, _, value = line.partition(b":")
                # Those that decide where a request goes or ends stay.
                is_strict = name.lower() in (b"host", b"transfer-encoding")
                once.setdefault((name.lower(), value.strip(), number if is_strict else 0), line)
            data = b"\r\n".join(once.values())
        headers: list[tuple[str, str]] = super().parse_headers(data, from_trailer)
        return headers

    def _peer_is_trusted_proxy(self) -> bool:
        """Whether the peer may set forwarding headers; parsing its address takes as long as the others do."""
        known: dict[Any, bool] = self.unreader.__dict__.setdefault("trusted", {})
        if self.peer_addr not in known:
            known[self.peer_addr] = super()._peer_is_trusted_proxy()
        return known[self.peer_addr]


class Parser(RequestParser):  # type: ignore[misc]
    """Reads a connection's requests."""

    mesg_class = UnrepeatedRequest


class Listener(StreamServer):  # type: ignore[misc]
    """Accepts connections, and pauses while there are no file descriptors left."""

    def __init__(self, worker: "Worker", sock: Any, **options: Any) -> None:
        super().__init__(sock, handle=worker.handle_client, spawn=worker.pool, **options)
        self._log = worker.log
        self.name = sock.getsockname()
        self.full = worker.is_full
        self._unused_seconds = max(READ_SECONDS, worker.cfg.keepalive)
        if worker.cfg.workers > 1:
            self.max_accept = 1

    def do_read(self) -> tuple[PatientSocket, Any] | None:
        """Accept the next waiting connection, if any."""
        try:
            fd, address = self.socket._accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._log.error("Cannot accept connections: %s; trying again", error.strerror)
            self.stop_accepting()
            self._timer = self.loop.timer(PAUSE_SECONDS)
            self._timer.start(self._start_accepting_if_started)
            return None
        client = PatientSocket(self.socket.family, self.socket.type, self.socket.proto, fileno=fd)
        client.listener = self.name
        client.expect(self._unused_seconds)
        return client, address

    def drain(self) -> None:
        """Serve the clients that have already connected, and refuse later ones immediately."""
        self.stop_accepting()
        for _ in range(MAX_BACKLOG):
            accepted = None if self.full() else self.do_read()
            if accepted is None:
                break
            self.do_handle(*accepted)
        self.close()


@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    """The Date header, cached because formatting it costs as much as sending a short response."""
    date: str = util.http_date(second)
    return date


class ServiceResponse(wsgi.Response):  # type: ignore[misc]
    """Gunicorn's response, with headers and body sent together in one packet."""

    headers_sent: bool
    _head = b""

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """Announce that the connection will be closed if the body was late or much of it was not read."""
        body = self.req.body.reader
        is_left = (
            getattr(body, "length", 0) > MAX_DISCARDED_BYTES or getattr(body, "parser", None) is not None
        )
        if is_left or status.startswith("408"):
            self.force_close()
        if getattr(headers, "are_checked", False):
            # Gunicorn would check each name and value again.
            self.status, self.status_code, self.headers = status, int(status[:3]), headers
            self.response_length = int(dict(headers)["Content-Length"])
            self._omits_body = self.req.method == "HEAD"
            return self.write
        return super().start_response(status, headers, exc_info)

    def send_headers(self) -> None:
        if not self.headers_sent:
            major, minor = self.req.version
            connection = "close" if self.should_close() else "keep-alive"
            lines = [
                f"HTTP/{major}.{minor} {self.status}",
                f"Server: {self.version}",
                f"Date: {_date(int(time.time()))}",
                f"Connection: {connection}",
            ]
            if self.chunked:
                lines.append("Transfer-Encoding: chunked")
            lines += [f"{name}: {value}" for name, value in self.headers]
            self._head = "\r\n".join([*lines, "", ""]).encode("latin-1")
            self.headers_sent = True

    def _emit_body(self, data: bytes) -> None:
        if self.chunked:
            data = b"%X\r\n%b\r\n" % (len(data), data)
        self.sock.sendall(self._head + data)
        self._head = b""

    def close(self) -> None:
        self.send_headers()
        end = self._head + (b"0\r\n\r\n" if self.chunked else b"")
        if end:
            self.sock.sendall(end)


class Worker(GeventWorker):  # type: ignore[misc]
    """Gunicorn's gevent worker with time limits for clients, a lossless drain, and refusals in JSON."""

    alive: bool
    sockets: list[Any]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._graceful_seconds = float(self.cfg.graceful_timeout)
        # Gunicorn's own loop serves HTTP/2, uwsgi and TLS, which this class does not support.
        self._is_stock = self.cfg.is_ssl or self.cfg.protocol != "http" or "h2" in self.cfg.http_protocols

    def patch(self) -> None:
        """Patch this worker, after the fork and before the app is loaded; no other process is patched.

        DNS and subprocess stay unpatched, since a web worker uses neither.
        """
        monkey.patch_time()
        monkey.patch_thread()
        # Thread pools use this queue, which would otherwise block every greenlet.
        monkey.patch_queue()
        monkey.patch_select()
        monkey.patch_socket(dns=False)
        if self.cfg.is_ssl:
            monkey.patch_ssl()
        self.sockets = [
            gevent_socket.socket(listener.FAMILY, gevent_socket.SOCK_STREAM, fileno=listener.sock.detach())
            for listener in self.sockets
        ]

    def init_process(self) -> None:
        # Gunicorn's parser reads a dozen settings for each request. As attributes of the instance they take
        # one lookup each instead of three.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        self.pool = Pool(self.worker_connections)
        # The longest idle first.
        self._idle: dict[PatientSocket, None] = {}
        self._full_logged = -FULL_LOG_SECONDS
        self._large_bodies = BoundedSemaphore(MAX_LARGE_BODIES)
        self._ended = Event()
        super().init_process()

    def notify(self) -> None:
        """Send the master a heartbeat; if the master is dead, shut down."""
        self.tmp.notify()
        if self.alive and self.ppid != os.getppid():
            self.log.info("Parent changed, shutting down: %s", self)
            self._graceful_seconds = ORPHAN_SECONDS
            self.alive = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self._ended.set()

    def run(self) -> None:
        options = {"ssl_context": ssl_context(self.cfg)} if self.cfg.is_ssl else {}
        listeners = [Listener(self, sock, **options) for sock in self.sockets]
        for listener in listeners:
            listener.start()
        while self.alive:
            self.notify()
            self._ended.wait(1.0)
        for listener in listeners:
            listener.drain()
        self._drain()
        if self.ppid != os.getppid():
            logs.writer.flush()
            os._exit(0)

    def _drain(self) -> None:
        """Wait for the requests in flight and those that may be on their way."""
        end = time.monotonic() + self._graceful_seconds
        gevent.spawn_later(min(LINGER_SECONDS, self._graceful_seconds), self._hang_up)
        while self.pool and (left := end - time.monotonic()) > 0:
            self.notify()
            self.pool.join(min(left, 1.0))
        if self.pool:
            self.log.warning("%d requests were not answered within graceful_timeout", len(self.pool))

    def _hang_up(self) -> None:
        for client in self._idle:
            _end(client)

    def is_full(self) -> bool:
        """Whether all connections are taken while another waits; if so, end the one that is idle longest."""
        if not self.pool.full():
            return False
        if time.monotonic() - self._full_logged > FULL_LOG_SECONDS:
            self._full_logged = time.monotonic()
            self.log.warning(
                "All %d connections are taken (--worker-connections); idle ones are closed first",
                self.worker_connections,
            )
        idle = next((client for client in self._idle if not client.begun), None)
        if idle is not None:
            del self._idle[idle]
            _end(idle)
        return True

    # One connection, in its greenlet

    def handle_client(self, client: Any, address: Any) -> None:
        """Serve a connection until it ends."""
        if self._is_stock:
            self.handle(client, client, address)
            return
        try:
            self._serve(client, address)
        except OSError as error:
            self.log.debug("A connection ended: %s", error)
            util.close(client)
        else:
            client.expect(READ_SECONDS)
            util.close_graceful(client)

    def _serve(self, client: PatientSocket, address: Any) -> None:
        """Answer requests until the connection ends. Raises OSError if the client is gone."""
        parser = Parser(self.cfg, client, address)
        request = None
        keep = True
        try:
            while keep:
                self._idle[client] = None
                try:
                    request = next(parser)
                finally:
                    self._idle.pop(client, None)
                body = request.body.reader
                is_small = getattr(body, "length", LARGE_BODY_BYTES) < LARGE_BODY_BYTES
                # A small compressed body may be large once it is decompressed.
                is_plain = not any(name == "CONTENT-ENCODING" for name, _ in request.headers)
                with contextlib.nullcontext() if is_small and is_plain else self._large_bodies:
                    keep = self._answer(request, client, address)
                client.expect(self.cfg.keepalive if self.alive else LINGER_SECONDS)
        except StopIteration:
            return
        except errors.NoMoreData:
            self.log.debug("A client disconnected in the middle of its request")
        except TimeoutError as error:
            if not client.begun:
                return
            self.handle_error(request, client, address, error)
        except OSError:
            raise
        except Exception as error:
            self.handle_error(request, client, address, error)

    def _answer(self, request: Any, client: PatientSocket, address: Any) -> bool:
        """Answer a request; returns whether the connection stays open."""
        began = time.monotonic()
        answer, environ = wsgi.create(
            request, client, address, client.listener, self.cfg, response_class=ServiceResponse
        )
        environ["wsgi.multithread"] = True
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("This worker has served %d requests (max_requests) and is stopping", self.nr)
            self.alive = False
            self._ended.set()
        if not self.alive or not self.cfg.keepalive or self.pool.full():
            answer.force_close()
        try:
            chunks = self.wsgi(environ, answer.start_response)
            try:
                for chunk in chunks:
                    answer.write(chunk)
                answer.close()
            finally:
                if hasattr(chunks, "close"):
                    chunks.close()
        except Exception:
            if not answer.headers_sent or answer._head:
                raise
            # Part of the response has been sent; an error response would be read as the rest of it.
            self.log.exception("A response failed midway")
            raise ConnectionAbortedError from None
        if self.log.access_log_enabled:
            took = datetime.timedelta(seconds=time.monotonic() - began)
            self.log.access(answer, request, environ, took)
        return not answer.should_close()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Respond to a request that never reached Flask, in the native protocol's format."""
        from embedding_service.web import cors  # not needed in the master

        status, kind = next(
            (HTTPStatus(status), kind) for kinds, status, kind in REFUSALS if isinstance(exc, kinds)
        )
        if status == 500:
            self.log.error("A request failed outside the application", exc_info=exc)
            message = "the service failed on this request; its log says why"
        elif status == 408:
            message = "the request did not arrive in time"
        else:
            self.log.warning("Invalid request from ip=%s: %s", (addr or ("",))[0], exc)
            message = f"the request cannot be read: {exc}"
        request_id = uuid.uuid4().hex
        body = orjson.dumps({"error": message, "error_type": kind, "request_id": request_id})
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\n"
        )
        # A page may read this response if its origin is among what arrived first.
        origin = ORIGIN.search(getattr(client, "first", b""))
        permissions = cors.permissions(self.wsgi, origin[1].decode("latin-1") if origin else "")
        head += "".join(f"{name}: {value}\r\n" for name, value in permissions)
        with contextlib.suppress(OSError):
            client.sendall(head.encode() + b"\r\n" + body)


def _end(client: PatientSocket) -> None:
    """Let an idle client's connection end, unless a request is already on its way."""
    with contextlib.suppress(OSError):
        client.shutdown(gevent_socket.SHUT_RD)
