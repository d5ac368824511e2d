"""The gunicorn worker: gthread, where no client can hold a thread by being slow, and a drain loses none."""

import contextlib
import errno
import os
import select
import selectors
import socket
import struct
import time
from functools import partial
from typing import Any

from gunicorn.workers import gthread

# A request must arrive within READ_SECONDS and a second for each SLOWEST bytes of it, and an answer be
# taken likewise. So slow clients are cut off, and large bodies on slow lines are not.
READ_SECONDS, WRITE_SECONDS, SLOWEST = 6.0, 10.0, 50_000

# How often a thread that waits for a client looks at the clock.
LOOK_SECONDS = 1

# How long a thread waits for its client's next request before it gives the connection back.
LINGER_MILLISECONDS = 20

# What requests in flight have once the master is dead and nobody else ends this process.
ORPHAN_SECONDS = 2

MAX_BACKLOG = 2048

# As much of an unread body is read to keep the connection; gunicorn gives up at twice that.
DRAINED = 32_768


class PatientSocket(socket.socket):
    """A client's connection whose patience has an end; to gunicorn that looks like a client that left."""

    slow = False
    _headers = b""

    def begin(self) -> None:
        """A request begins to arrive."""
        self._read_by = time.monotonic() + READ_SECONDS

    def setblocking(self, flag: bool) -> None:
        """Gunicorn sets it several times for each request; only changes cost a system call."""
        if self.getblocking() != flag:
            super().setblocking(flag)

    def flush(self) -> None:
        """Send headers that no body has followed."""
        if self._headers:
            self.sendall(b"")

    def recv(self, size: int, flags: int = 0) -> bytes:
        while True:
            late = time.monotonic() > self._read_by
            try:
                data = super().recv(size, flags | socket.MSG_DONTWAIT if late else flags)
            except BlockingIOError:
                if late or self.gettimeout() == 0:
                    self.slow = True
                    raise ConnectionResetError(errno.ECONNRESET, "the client sends too slowly") from None
                continue
            self._read_by += len(data) / SLOWEST
            return data

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all; the headers of an answer wait for its body, so that both leave in one packet."""
        if data[:9] == b"HTTP/1.1 " and data[9:10] != b"1" and data[-4:] == b"\r\n\r\n":
            self._headers = data
            return
        if self._headers:
            data, self._headers = self._headers + data, b""
        view = memoryview(data).cast("B")
        write_by = time.monotonic() + WRITE_SECONDS + len(view) / SLOWEST
        while view:
            with contextlib.suppress(BlockingIOError):
                view = view[self.send(view, flags) :]
            if view and time.monotonic() > write_by:
                self.slow = True
                raise ConnectionResetError(errno.ECONNRESET, "the client reads too slowly")


class Connection(gthread.TConn):  # type: ignore[misc]
    """A connection that may be closed twice, and that lingers for no slow client."""

    def close(self, graceful: bool = False) -> None:
        if self.sock.fileno() != -1:
            super().close(graceful and not getattr(self.sock, "slow", False))


def _announce_close(app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    """Call the application, and have an answer say so where the connection will end after it.

    Gunicorn closes a connection on which much of a body lies unread, as after a refusal, but has promised
    to keep it by then; a client that believes that loses its next request.
    """

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        body = environ["wsgi.input"].reader
        if getattr(body, "length", 0) > DRAINED or getattr(body, "parser", None) is not None:
            start_response.__self__.force_close()
        return start_response(status, headers, exc_info)

    return app(environ, start)


class Worker(gthread.ThreadWorker):  # type: ignore[misc]
    """Connections get a thread when they have sent something, and lose it when they stall."""

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection, and wait for its first bytes without a thread."""
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                return
            raise
        sock = PatientSocket(accepted.family, accepted.type, accepted.proto, accepted.detach())
        look = struct.pack("ll", LOOK_SECONDS, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, look)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, look)
        conn = Connection(self.cfg, sock, address, listener.getsockname())
        self.nr_conns += 1
        conn.timeout = time.monotonic() + READ_SECONDS
        self.pending_conns.append(conn)
        self.poller.register(sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def enqueue_req(self, conn: Any) -> None:
        conn.data_ready = True
        if isinstance(conn.sock, PatientSocket):
            conn.sock.begin()
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """Handle requests for as long as the client sends the next one at once.

        Gunicorn would hand the connection to the thread that accepts for all, which waits for it with
        the others and finds a thread for it again: more work than parsing the request. Where the
        connection ends, it is closed here, since closing waits for the client.
        """
        keep = self._handle_one(conn)
        while keep is True and self._next_is_there(conn):
            keep = self._handle_one(conn)
        if not keep:
            with contextlib.suppress(OSError):
                conn.close(graceful=True)
        return keep

    def _handle_one(self, conn: Any) -> Any:
        keep = super().handle(conn)
        if isinstance(conn.sock, PatientSocket):
            with contextlib.suppress(OSError):
                conn.sock.flush()
        return keep

    def _next_is_there(self, conn: Any) -> bool:
        """Wait a moment for the next request, unless other connections wait for a thread in vain."""
        pool = self.tpool
        wanted = pool._work_queue.qsize() > 0 and len(pool._threads) >= pool._max_workers
        if wanted or not self.alive or not isinstance(conn.sock, PatientSocket):
            return False
        if not conn.parser.unreader.buf.getvalue():
            poll = select.poll()
            poll.register(conn.sock, select.POLLIN)
            if not poll.poll(LINGER_MILLISECONDS):
                return False
        conn.sock.begin()
        return True

    def set_accept_enabled(self, enabled: bool) -> None:
        """At the end, take those who are connected already, and turn later ones away at once."""
        super().set_accept_enabled(enabled)
        if enabled or self.alive:
            return
        for listener in self.sockets:
            for _ in range(MAX_BACKLOG):
                before = self.nr_conns
                self.accept(listener)
                if self.nr_conns == before:
                    break
            listener.close()

    def is_parent_alive(self) -> bool:
        alive = bool(super().is_parent_alive())
        if not alive:
            self.alive = False
            self.cfg.set("graceful_timeout", ORPHAN_SECONDS)
        return alive

    def run(self) -> None:
        self.wsgi: Any = partial(_announce_close, self.wsgi)
        super().run()
        if self.ppid != os.getppid():
            os._exit(0)
