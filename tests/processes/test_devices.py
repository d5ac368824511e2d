"""DEVICE=cpu,cpu: two model processes behind one service, each with its share of the cores."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import requests

from embedding_service.inference.cores import available_cores
from tests.service import ROOT, Service, command_of, wait_until


@pytest.fixture(scope="module")
def pair(own_process, tmp_path_factory):
    running = Service(tmp_path_factory.mktemp("pair"), DEVICE="cpu,cpu", LOG_LEVEL="info").wait_ready(120)
    try:
        wait_until(lambda: running.log().count("Loaded ") == 2, "two loaded models")
        yield running
    finally:
        running.stop()


def model_processes(service: Service) -> list[psutil.Process]:
    return [p for p in service.processes() if "embedding_service.sharing.server" in command_of(p)]


def devices(service: Service) -> list[dict[str, str]]:
    found: list[dict[str, str]] = requests.get(f"{service.url}/info", timeout=60).json()["devices"]
    return found


def ask(service: Service, texts: list[str]) -> np.ndarray:
    response = service.post("/embed", {"texts": texts})
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"])


def test_requests_go_to_the_less_loaded_process_and_all_vectors_are_right(pair, oracle):
    """While one is paused, and keeps what it was sent, the other must answer."""
    for paused in model_processes(pair):
        batches = [[f"text {number} of request {turn}" for number in range(8)] for turn in range(8)]
        paused.suspend()
        with ThreadPoolExecutor(8) as clients:
            try:
                answers = [clients.submit(ask, pair, texts) for texts in batches]
                wait_until(lambda: any(answer.done() for answer in answers), "an answer")  # noqa: B023
            finally:
                paused.resume()
            for texts, answer in zip(batches, answers, strict=True):
                expected = oracle.encode(texts, normalize_embeddings=True)
                assert np.abs(answer.result() - expected).max() < 1e-5


def test_info_and_metrics_name_each_process(pair):
    wait_until(lambda: devices(pair) == [{"device": "cpu", "status": "healthy"}] * 2, "two ready devices")
    served = re.compile(r'^embedding_process_texts_total\{device="cpu",process="(\d)"\} (\d+)', re.MULTILINE)

    def both_count() -> bool:
        ask(pair, ["a text for whichever is next"])
        found = dict(served.findall(requests.get(f"{pair.url}/metrics", timeout=60).text))
        return sorted(found) == ["0", "1"] and all(float(count) > 0 for count in found.values())

    wait_until(both_count, "texts of both processes")


def test_the_cores_are_divided(pair):
    each = max(1, available_cores() // 2)
    lines = [line for line in pair.log().splitlines() if "Loaded " in line]
    assert len(lines) == 2
    assert all(f"threads: {each}," in line for line in lines)


def test_what_a_killed_process_had_not_answered_is_answered_by_the_other(pair, oracle):
    """It is paused before it is killed, so that it has not answered."""
    batches = [[f"text {number} of request {turn}" for number in range(8)] for turn in range(24)]
    victim = model_processes(pair)[0]
    victim.suspend()
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, pair, texts) for texts in batches]
        wait_until(lambda: sum(answer.done() for answer in answers) >= 4, "answers of the other")
        victim.kill()
        vectors = [answer.result() for answer in answers]
    lost = re.search(r"The model process was lost with (\d+) requests in flight", pair.log())
    assert lost is not None
    assert int(lost[1]) > 0
    expected = oracle.encode([text for texts in batches for text in texts], normalize_embeddings=True)
    assert np.abs(np.concatenate(vectors) - expected).max() < 1e-5
    wait_until(lambda: pair.log().count("Loaded ") == 3, "the lost process to come back")


def test_a_device_that_is_lost_under_load_loses_no_request_and_comes_back(own_process, tmp_path, oracle):
    """One of three devices fails in the middle of a batch."""
    service = Service(
        tmp_path,
        DEVICE="cpu,cpu,cpu",
        BACKEND="torch",
        PYTHONPATH=str(ROOT / "tests" / "faults" / "injection"),
        FAULTS_SEEN=str(tmp_path / "seen"),
    ).wait_ready()
    try:
        ready = [{"device": "cpu", "status": "healthy"}] * 3
        wait_until(lambda: devices(service) == ready, "three ready devices")
        batches = [[f"text {number} of request {turn}" for number in range(4)] for turn in range(30)]
        batches[10][0] += " @@sticky-once@@"
        expected = [oracle.encode(texts, normalize_embeddings=True) for texts in batches]
        lost, stop = threading.Event(), threading.Event()

        def watch() -> None:
            while not stop.is_set():
                if [one["status"] for one in devices(service)].count("healthy") == 2:
                    lost.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(8) as clients:
                answers = list(clients.map(lambda texts: ask(service, texts), batches))
            assert lost.wait(120)
            wait_until(lambda: devices(service) == ready, "three ready devices again")
        finally:
            stop.set()
            watcher.join()
        for answer, right in zip(answers, expected, strict=True):
            assert np.abs(answer - right).max() < 1e-5
        assert service.log().count("The device is lost") == 1
    finally:
        service.stop()
