"""DEVICE=cpu,cpu: two model processes behind one service, each with its share of the cores."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from embedding_service.inference.cores import available_cores
from tests.service import Service, wait_until


@pytest.fixture(scope="module")
def pair(own_process, tmp_path_factory):
    running = Service(tmp_path_factory.mktemp("pair"), DEVICE="cpu,cpu", LOG_LEVEL="info").wait_ready(120)
    try:
        wait_until(lambda: running.log().count("Loaded ") == 2, "two loaded models")
        yield running
    finally:
        running.stop()


def model_processes(service: Service) -> list[psutil.Process]:
    return [p for p in service.processes() if "embedding_service.sharing.server" in p.cmdline()]


def ask(service: Service, texts: list[str]) -> np.ndarray:
    response = service.post("/embed", {"texts": texts})
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"])


def test_requests_go_to_both_and_all_vectors_are_right(pair, oracle):
    first, second = model_processes(pair)
    before = [process.cpu_times().user for process in (first, second)]
    batches = [[f"text {number} of request {turn}" for number in range(8)] for turn in range(24)]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda texts: ask(pair, texts), batches))
    for texts, answer in zip(batches, answers, strict=True):
        assert np.abs(answer - oracle.encode(texts, normalize_embeddings=True)).max() < 1e-5
    used = [process.cpu_times().user - then for process, then in zip((first, second), before, strict=True)]
    # The less loaded process gets the next request, so neither is idle while the other works.
    assert min(used) > 0.2 * max(used)


def test_the_cores_are_divided(pair):
    each = max(1, available_cores() // 2)
    lines = [line for line in pair.log().splitlines() if "Loaded " in line]
    assert len(lines) == 2
    assert all(f"threads: {each}," in line for line in lines)


def test_what_a_killed_process_had_not_answered_is_answered_by_the_other(pair, oracle):
    batches = [
        [f"text {number} of request {turn} " + "on " * 60 for number in range(8)] for turn in range(24)
    ]
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, pair, texts) for texts in batches]
        wait_until(lambda: sum(answer.done() for answer in answers) >= 4, "both to be at work")
        model_processes(pair)[0].kill()
        vectors = [answer.result() for answer in answers]
    lost = re.search(r"The model process was lost with (\d+) requests in flight", pair.log())
    assert lost is not None
    assert int(lost[1]) > 0
    expected = oracle.encode([text for texts in batches for text in texts], normalize_embeddings=True)
    assert np.abs(np.concatenate(vectors) - expected).max() < 1e-5
    wait_until(lambda: pair.log().count("Loaded ") == 3, "the lost process to come back")
