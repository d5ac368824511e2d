"""Every process is killed or stopped under load: nothing hangs, nothing is left behind, nothing is lost."""

import json
import os
import shutil
import signal
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests

from tests.faults.conftest import kept_until_end
from tests.faults.load import Seen, body, closed_loop
from tests.reliability import record
from tests.service import Service, wait_until

CLIENTS = 8


@pytest.fixture(scope="module")
def two_workers(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with kept_until_end(Service(tmp_path_factory.mktemp("processes"), WEB_CONCURRENCY="2")) as running:
        yield running


@contextmanager
def load(service: Service) -> Iterator[list[Seen]]:
    """Clients that send requests during the block; the list is complete when it ends."""
    seen: list[Seen] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            seen.append(closed_loop(service.port, CLIENTS, 1.0, lambda c, n: body(f"client {c} asks {n}")))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: seen, "the first answers")
        yield seen
    finally:
        stop.set()
        thread.join(120)
        assert not thread.is_alive(), "a client hangs"


def statuses(seen: list[Seen]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in seen:
        for status, count in one.statuses.items():
            total[status] = total.get(status, 0) + count
    return total


def explained(service: Service, seen: list[Seen]) -> str:
    """What the clients and the log of the service say of a failure, without a line for each request."""
    reasons = Counter(
        json.loads(answer)["error"] for one in seen for answer in one.errors.elements() if answer
    )
    log = [line for line in service.log().splitlines() if "web.error_handlers" not in line]
    return "\n".join([str(reasons), *log[-60:]])


def gone(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_runtime_folder_is_private(two_workers):
    folder = Path(two_workers.supervisor().cmdline()[3])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.promise
def test_the_model_process_is_killed_under_load(two_workers):
    with load(two_workers) as seen:
        two_workers.model_process().kill()
        killed = time.monotonic()
        wait_until(lambda: not two_workers.is_healthy(), "a 503 of /health")
        noticed = time.monotonic() - killed
        two_workers.wait_ready()
        recovered = time.monotonic() - killed
        before = len(seen)
        wait_until(lambda: len(seen) > before + 1, "answers afterwards")
    total = statuses(seen)
    assert set(total) == {"200", "503"}, explained(two_workers, seen)
    assert all(wait > 0 for one in seen for wait in one.waits)
    assert sum(len(one.waits) for one in seen) == total["503"]
    record(
        "`kill -9` of the model process",
        f"under load of {CLIENTS} clients",
        1,
        f"/health 503 after {noticed * 1e3:.0f} ms, ready again after {recovered:.1f} s; meanwhile "
        f"{total['503']} times 503, each with Retry-After; no client hung",
    )


def test_a_web_worker_is_killed_under_load(two_workers):
    with load(two_workers) as seen:
        victim = two_workers.web_workers()[0]
        victim.kill()
        wait_until(lambda: len(two_workers.web_workers()) == 2 and not victim.is_running(), "a new worker")
        before = len(seen)
        wait_until(lambda: len(seen) > before + 1, "answers afterwards")
    total = statuses(seen)
    broken = sum(count for status, count in total.items() if status != "200")
    others = set(total) - {"200", "ConnectionResetError", "RemoteDisconnected", "BrokenPipeError"}
    assert not others, explained(two_workers, seen)
    assert broken <= CLIENTS
    record(
        "`kill -9` of one of two web workers",
        f"under load of {CLIENTS} clients",
        1,
        f"{total['200']} answers; {broken} connections of the dead worker broke",
        "only its own requests in flight",
    )


def test_sighup_replaces_the_workers_and_loses_nothing(two_workers):
    with load(two_workers) as seen:
        old = two_workers.web_workers()
        two_workers.process.send_signal(signal.SIGHUP)
        wait_until(lambda: gone(old), "the end of the old workers")
        before = len(seen)
        wait_until(lambda: len(seen) > before + 1, "answers afterwards")
    total = statuses(seen)
    assert set(total) == {"200"}, explained(two_workers, seen)
    record(
        "SIGHUP",
        f"under load of {CLIENTS} clients",
        1,
        f"new workers; {total['200']} of {total['200']} answered",
    )


def test_sigterm_with_fifty_requests_in_flight_loses_none(two_workers):
    """Runs last. The model process is paused until the signal has arrived, so that all fifty wait."""
    processes = two_workers.processes()
    model = two_workers.model_process()
    model.suspend()
    seen: list[Seen] = []
    texts = [f"a text that is on its way, number {n}" for n in range(20)]

    def clients() -> None:
        seen.append(closed_loop(two_workers.port, 50, 60, lambda c, n: body(texts), limit=1))

    def connected() -> bool:
        connections = [c for w in two_workers.web_workers() for c in w.net_connections("tcp")]
        return sum(c.status == "ESTABLISHED" for c in connections) >= 50

    thread = threading.Thread(target=clients)
    thread.start()
    wait_until(connected, "fifty connections")
    began = time.monotonic()
    two_workers.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "Handling signal: term" in two_workers.log(), "the signal's arrival")
    model.resume()
    code = two_workers.process.wait(120)
    seconds = time.monotonic() - began
    thread.join(120)
    assert code == 0
    assert seen[0].statuses == {"200": 50}
    wait_until(lambda: gone(processes), "the end of every process")
    record("SIGTERM", "with 50 requests in flight", 50, f"50 answered, exit 0 after {seconds:.1f} s")


def test_the_master_is_killed_under_load(start_without_model):
    running = start_without_model(WEB_CONCURRENCY="2").wait_ready()
    processes = running.processes()
    folder = Path(running.supervisor().cmdline()[3])
    with load(running):
        running.process.kill()
        killed = time.monotonic()
        wait_until(lambda: gone(processes), "the end of every process")
        seconds = time.monotonic() - killed
    wait_until(lambda: not folder.exists(), "the end of the runtime folder")
    record("`kill -9` of the gunicorn master", "under load", 1, f"no process left after {seconds:.1f} s")


GUNICORN = str(Path(sys.executable).with_name("gunicorn"))
PRELOADED = [GUNICORN, "--preload", "-b", "127.0.0.1:{port}", "app:app"]


@pytest.mark.parametrize("command", [None, PRELOADED], ids=["as usual", "preloaded"])
def test_the_supervisor_is_killed(start_without_model, command):
    running = start_without_model(command).wait_ready()
    processes = running.processes()
    running.supervisor().kill()
    killed = time.monotonic()
    code = running.process.wait(120)
    seconds = time.monotonic() - killed
    assert code == 70
    assert "the supervisor of the model process was killed" in running.log()
    wait_until(lambda: gone(processes), "the end of every process")
    record(
        "`kill -9` of the supervisor",
        "an idle service",
        1,
        f"logs the reason and exits with 70 after {seconds:.1f} s",
    )


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["as usual", "preloaded"])
def test_sigusr2_hands_over_to_a_new_master_and_leaves_nothing(start_without_model, preload):
    """The new master has its own supervisor and folder, and the old one removes all that it had."""
    command = [GUNICORN, *preload, "-b", "127.0.0.1:{port}", "app:app"]
    running = start_without_model(command).wait_ready()
    old = running.processes()
    old_folder = Path(running.supervisor().cmdline()[3])
    running.process.send_signal(signal.SIGUSR2)
    new_master = wait_until(lambda: _new_master(running, old), "a new master")
    try:
        wait_until(lambda: _loaded_below(new_master), "the model of the new master")
        # Both masters' workers answer on the port; those of the new one may still be connecting to its model.
        wait_until(lambda: all(running.is_healthy() for _ in range(20)), "answers of all workers")
        with load(running) as seen:
            assert running.stop() == 0
            wait_until(lambda: gone(old), "the end of the old master's processes")
            before = len(seen)
            wait_until(lambda: len(seen) > before + 1, "answers of the new master")
        assert set(statuses(seen)) == {"200"}
        assert not old_folder.exists()
        new = [new_master, *new_master.children(recursive=True)]
        (supervisor,) = (p for p in new if SUPERVISOR in p.cmdline())
        new_folder = Path(supervisor.cmdline()[3])
        assert new_folder.exists()
    finally:
        new_master.terminate()
    wait_until(lambda: gone(new), "the end of the new master's processes")
    assert not new_folder.exists()


SUPERVISOR = "embedding_service.sharing.supervisor"


def _new_master(service: Service, old: list[psutil.Process]) -> psutil.Process | None:
    """The old master's new child, once it has a supervisor of its own."""
    for child in psutil.Process(service.process.pid).children():
        with suppress(psutil.Error):  # a process may end in between
            if child not in old and any(SUPERVISOR in p.cmdline() for p in child.children()):
                return child
    return None


def _loaded_below(master: psutil.Process) -> bool:
    """Whether the model process of this master has a heartbeat, which begins once the model is loaded."""
    (supervisor,) = (p for p in master.children() if SUPERVISOR in p.cmdline())
    return Path(supervisor.cmdline()[3], "model-0.heartbeat").exists()


def test_a_model_process_that_dies_five_times_in_a_minute_ends_the_service(start_without_model):
    running = start_without_model()
    began = time.monotonic()
    for _ in range(5):
        process = wait_until(lambda: _model_process(running), "a model process")
        process.kill()
        process.wait(60)  # otherwise the next iteration may find it again while it dies
    code = running.process.wait(120)
    assert code == 70
    assert "ended 5 times in 60 s, most recently by signal 9" in running.log()
    record(
        "model process that keeps dying",
        "killed 5 times",
        5,
        f"restarts with growing pauses, then exit 70 with the reason after {time.monotonic() - began:.1f} s",
    )


def _model_process(service: Service) -> psutil.Process | None:
    try:
        process = service.model_process()
        return process if process.status() != psutil.STATUS_ZOMBIE else None
    except (AssertionError, psutil.NoSuchProcess):
        return None


def copied(model_folder: Path, target: Path) -> Path:
    shutil.copytree(model_folder, target)
    return target


def corrupt(model_folder: Path, tmp_path: Path) -> str:
    folder = copied(model_folder, tmp_path / "corrupt")
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    return str(folder)


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


def harmful(model_folder: Path, tmp_path: Path) -> str:
    """Weights as a pickle that runs code."""
    import torch

    folder = copied(model_folder, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Harmful(tmp_path / "harm")}, folder / "pytorch_model.bin")
    return str(folder)


def missing(model_folder: Path, tmp_path: Path) -> str:
    folder = copied(model_folder, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(corrupt, "cannot be loaded"), (harmful, "cannot be loaded"), (missing, "has no weights")],
    ids=["corrupt weights", "pickle with code", "no weights"],
)
def test_a_model_that_cannot_be_loaded_gets_one_line_and_an_exit_code(
    start, tmp_path, model_folder, model, reason
):
    running = start(EMBEDDING_MODEL=model(model_folder, tmp_path), BACKEND="torch")
    code = running.process.wait(120)
    log = running.log()
    assert code == 78, log
    assert reason in log
    assert "Traceback" not in log
    assert len(log.splitlines()) < 12, log
    assert not (tmp_path / "harm").exists()
    record(
        f"a model with {model.__name__} weights", "at the first start", 1, "one line with the reason, exit 78"
    )


def test_a_full_disk_for_the_log_file_is_detected_at_the_start(start):
    running = start(LOG_FILE="/dev/full")
    assert running.process.wait(120) == 78
    assert running.log().splitlines() == ["LOG_FILE='/dev/full' cannot be written: No space left on device"]
    record("LOG_FILE on a full disk", "at the start", 1, "one line, exit 78")


def test_an_unwritable_log_file_is_detected_at_the_start(start):
    running = start(LOG_FILE="/proc/no/such/file")
    assert running.process.wait(120) == 78
    assert len(running.log().splitlines()) == 1
    record("unwritable LOG_FILE", "at the start", 1, "one line, exit 78")


def test_an_unwritable_home_and_the_hash_seed_make_no_difference(start, service):
    running = start(HOME="/proc/no/such/home", PYTHONHASHSEED="7").wait_ready()
    here, there = (
        requests.get(f"{s.url}/info", timeout=60).json()["fingerprint"] for s in (running, service)
    )
    assert here == there
    assert "Traceback" not in running.log()
    record("unwritable HOME", "a start with the default model", 1, "serves, with the same fingerprint")
