"""The production server: gunicorn's settings, and the model processes that its master runs."""

import importlib
import signal
import sys
from pathlib import Path
from typing import Any

from gunicorn import glogging, systemd

from embedding_service.errors import StartupError
from embedding_service.observability import collector, logs
from embedding_service.server import preflight
from embedding_service.settings import environment
from embedding_service.sharing import supervisor_handle
from embedding_service.sharing.settings import EX_CONFIG
from embedding_service.web.keys import OPEN_WARNING

try:
    started = environment.current()
    settings = started.settings
    # Not again at SIGHUP, when a hanging disk would stop the master.
    if supervisor_handle.inherited() is None:
        logs.check(settings)
    logs.setup(settings)
    supervisor = supervisor_handle.prepare()
except StartupError as error:
    logs.refuse(error, environment.log_format())
    sys.exit(EX_CONFIG)

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.web_concurrency
worker_class = "embedding_service.server.worker.Worker"
# For -k gthread, and sync, which becomes gthread; our own worker uses greenlets.
threads = min(128, settings.max_concurrent_requests)
# Connections per worker, idle ones included; each is a greenlet.
worker_connections = 8192
graceful_timeout = settings.graceful_timeout_seconds
# By default longer than nginx's 60 s, so that we never close a connection that nginx is about to use.
keepalive = settings.keep_alive_seconds
# In memory, so that the heartbeat does not wait for a slow disk.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
control_socket_disable = True
# How long a new worker waits for the state of the model processes, at most; a refusal is known immediately.
SETTLE_SECONDS = 10.0
# Every response must go through the worker's socket, which times out slow clients.
sendfile = False
# No request header may set SCRIPT_NAME or PATH_INFO, wherever it comes from.
forwarder_headers = ""


class Logger(glogging.Logger):  # type: ignore[misc]
    """Logs in our format; --access-logfile still works, and is off by default."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        logs.setup(settings)

    def debug(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Drop gunicorn's dump of its configuration, a single record of a hundred lines."""
        if not str(msg).startswith("Current configuration:"):
            super().debug(msg, *args, **kwargs)


logger_class = Logger


def on_starting(server: Any) -> None:
    """In the master, before any worker: start the supervisor of the model processes."""
    # SIGUSR2 runs this command again; sys.argv no longer has all of it after `python -m`.
    server.START_CTX["args"] = [sys.executable, *sys.orig_argv[1:]]
    if server.cfg.worker_class_str != worker_class:
        server.log.warning("-k %s: slow clients can hold up this worker", server.cfg.worker_class_str)
    elif server.cfg.threads != threads:
        server.log.warning("--threads has no effect: this worker has a greenlet for each connection")
    try:
        preflight.check(started)
        for address in _new_addresses(server):
            preflight.check_address(*address)
        supervisor.start(settings)
    except StartupError as error:
        if server.pidfile is not None:
            server.pidfile.unlink()
        logs.refuse(error, settings.log_format)
        sys.exit(EX_CONFIG)
    # Gunicorn's own flags win over HOST. Addresses that are not tuples are unix sockets or open files.
    for address in server.cfg.address:
        if isinstance(address, tuple) and settings.is_open_at(address[0]):
            server.log.warning(OPEN_WARNING, address[0])
    if not server.cfg.is_ssl:
        # Meanwhile the model is loading. The workers share the memory of what is imported before the fork; a
        # worker with TLS must patch it before anything imports it.
        importlib.import_module("embedding_service.server.app")
        collector.freeze()


def _new_addresses(server: Any) -> list[tuple[str, int]]:
    """The addresses to bind; after SIGUSR2 or from systemd they arrive as open sockets instead."""
    if server.master_pid or systemd.listen_fds(unset_environment=False) or server.cfg.reuse_port:
        return []
    return [address[:2] for address in server.cfg.address if isinstance(address, tuple) and address[1]]


def post_fork(server: Any, worker: Any) -> None:
    """In a worker: close what belongs to the master, and drop its signal handlers.

    Until the worker has its own, they would swallow the signal to stop, and the master would wait for this
    worker until its time to finish is over.
    """
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    supervisor.forget()


def post_worker_init(worker: Any) -> None:
    """In a worker with its app: connect its shutdown signal, and wait for the model's first status."""
    from embedding_service.observability import metrics  # not needed by a master with TLS

    metrics.share(supervisor.folder.metrics)
    context = worker.wsgi.extensions["embedding_service"]
    context.draining = lambda: not worker.alive
    # Long enough for a busy machine: until then this worker would answer 503 while the others serve.
    context.engine.settle(SETTLE_SECONDS)
    collector.freeze()


def on_exit(server: Any) -> None:
    """In the master, after the workers have drained: end the model processes and report any failure."""
    failure = supervisor.stop()
    if failure is not None:
        server.log.error("The service failed: %s", failure.reason)
        sys.exit(failure.code)
