"""Faults in the model process, injected by words in texts: each fails its own request and no other."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import requests

from tests.faults.conftest import DEADLINE
from tests.reliability import record
from tests.service import Service, wait_until


def parallel(jobs: list[Callable[[], requests.Response]]) -> list[requests.Response]:
    """Run all at the same time; each must get a response."""
    results: list[requests.Response | None] = [None] * len(jobs)

    def run(index: int) -> None:
        results[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


def embed(service: Service, texts: list[str] | str) -> Callable[[], requests.Response]:
    return lambda: service.post("/embed", {"texts": texts})


def same(response: requests.Response, expected: np.ndarray) -> bool:
    return np.abs(np.array(response.json()["embeddings"]) - expected).max() < 1e-5


def test_one_poisoned_text_among_a_hundred_concurrent_requests(faulty, oracle):
    texts = [f"neighbour {n} of a text that cannot be embedded" for n in range(100)]
    expected = oracle.encode(texts, normalize_embeddings=True)
    jobs = [embed(faulty, text) for text in texts]
    jobs[40] = embed(faulty, ["fine", "@@poison@@"])
    results = parallel(jobs)
    assert len(results) == 100
    guilty = results.pop(40)
    expected = np.delete(expected, 40, axis=0)
    assert guilty.status_code == 500
    assert guilty.json()["error"] == "texts[1] could not be embedded"
    assert all(r.status_code == 200 and same(r, expected[i]) for i, r in enumerate(results))
    record(
        "a text on which the model fails",
        "one among 100 concurrent requests",
        1,
        "one 500 that names the text; 99 vectors equal sentence-transformers within 1e-5",
    )


@pytest.mark.parametrize("overflow", ["truncate", "mean"])
def test_on_error_null_returns_the_other_vectors_if_texts_fail(faulty, oracle, overflow):
    texts = ["before", "@@poison@@", "between", "@@nan-always@@", "after"]
    response = faulty.post("/embed", {"texts": texts, "overflow": overflow, "on_error": "null"})
    body = response.json()
    assert response.status_code == 200, body
    assert [error["index"] for error in body["errors"]] == [1, 3]
    assert {error["error_type"] for error in body["errors"]} == {"internal"}
    assert [index for index, one in enumerate(body["embeddings"]) if one is None] == [1, 3]
    good = [body["embeddings"][index] for index in (0, 2, 4)]
    expected = oracle.encode(["before", "between", "after"], normalize_embeddings=True)
    assert np.abs(np.array(good) - expected).max() < 1e-5


def test_a_batch_that_runs_out_of_memory_is_halved(faulty, oracle):
    # Short, so that even a small batch holds several.
    texts = [f"{n} @@oom@@" for n in range(40)]
    response = faulty.post("/embed", {"texts": texts})
    assert response.status_code == 200
    assert same(response, oracle.encode(texts, normalize_embeddings=True))
    halvings = faulty.log().count("Out of memory with")
    assert halvings
    record(
        "CUDA out of memory (injected)",
        "every batch of more than one text raises it, 40 texts",
        halvings,
        "200 after halving; vectors equal within 1e-5",
    )


def test_a_nonfinite_vector_is_recomputed(faulty, oracle):
    texts = ["before", "@@nan@@", "after"]
    response = faulty.post("/embed", {"texts": texts})
    assert response.status_code == 200
    assert same(response, oracle.encode(texts, normalize_embeddings=True))
    bad = faulty.post("/embed", {"texts": ["before", "after", "@@nan-always@@"]})
    assert (bad.status_code, bad.json()["error"]) == (500, "texts[2] has a vector that is not finite")
    assert "NaN" not in bad.text
    record(
        "a vector with NaN (injected)",
        "once in the batch; once also when computed alone",
        2,
        "computed again in float32 and equal within 1e-5; if that fails too, 500 that names the text",
    )


def test_a_deadline_that_passes_in_the_queue(impatient):
    """Two requests, due in four seconds, wait for a batch that takes longer."""
    impatient.held.touch()
    slow = threading.Thread(target=embed(impatient, "slow"))
    slow.start()
    wait_until(lambda: "slow" in impatient.seen(), "the slow text to reach the model")
    began = time.monotonic()
    late = parallel([embed(impatient, "late alone"), embed(impatient, [f"late {n}" for n in range(17)])])
    seconds = time.monotonic() - began
    impatient.held.unlink()
    slow.join()
    assert [response.status_code for response in late] == [504, 504]
    assert all(response.json()["error_type"] == "timeout" for response in late)
    wait_until(lambda: impatient.post("/embed", {"texts": "afterwards"}).status_code == 200)
    assert "late" not in impatient.seen()
    record(
        "deadline passes in the queue",
        f"one text and 17 texts behind a batch that takes longer, deadline {DEADLINE:.0f} s",
        2,
        f"504 after {seconds:.1f} s; the model never saw the texts",
    )


@pytest.mark.parametrize("how", ["hang", "freeze"])
def test_a_forward_pass_that_hangs(impatient, how):
    """`freeze` keeps the interpreter's lock, so that no other thread of the model process can run."""
    before = impatient.model_process()
    began = time.monotonic()
    response = impatient.post("/embed", {"texts": f"@@{how}@@"})
    answered = time.monotonic() - began
    assert response.status_code == 504
    assert answered >= DEADLINE
    during = requests.get(f"{impatient.url}/health/live", timeout=60)
    assert during.status_code == 200
    wait_until(lambda: not before.is_running(), "the end of the hung process")
    replaced = time.monotonic() - began
    impatient.wait_ready()
    ready = time.monotonic() - began
    wait_until(lambda: impatient.post("/embed", {"texts": "afterwards"}).status_code == 200, "an answer")
    note = "" if how == "hang" else ", holding the interpreter's lock"
    record(
        f"forward pass hangs{note} (injected)",
        f"deadline {DEADLINE:.0f} s",
        1,
        f"504 after {answered:.1f} s; process killed after {replaced:.1f} s, ready again after {ready:.1f} s",
    )


def test_a_sticky_device_error(faulty, oracle):
    texts = [f"in flight with a lost device {n}" for n in range(30)]
    expected = oracle.encode(texts, normalize_embeddings=True)
    before = faulty.model_process()
    statuses: list[tuple[float, int]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            health = faulty.health()
            statuses.append((time.monotonic(), health[0] if health else 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    jobs = [embed(faulty, text) for text in texts]
    results = parallel([*jobs, embed(faulty, "@@sticky@@")])
    wait_until(lambda: not before.is_running(), "the end of the process")
    gone = time.monotonic() - began
    faulty.wait_ready()
    ready = time.monotonic() - began
    stop.set()
    watcher.join()
    assert len(results) == 31
    assert results.pop().status_code == 503
    for index, response in enumerate(results):
        assert response.status_code in (200, 503)
        assert response.status_code == 503 or same(response, expected[index])
        assert response.status_code == 200 or "Retry-After" in response.headers
    not_ready = next(at for at, status in statuses if status == 503) - began
    assert all(status in (200, 503) for _, status in statuses)
    assert same(faulty.post("/embed", {"texts": texts[0]}), expected[0])
    record(
        "sticky CUDA error (injected)",
        "among 30 concurrent requests",
        1,
        f"not ready after {not_ready:.1f} s, process gone after {gone:.1f} s, "
        f"ready again after {ready:.1f} s; "
        f"{sum(r.status_code == 503 for r in results)} of 30 others got 503 + Retry-After, no wrong vector",
    )


def test_the_log_contains_no_text(faulty):
    """Runs after all tests above: none of their texts may be in the log."""
    secret = "zebra-in-the-vestibule"
    faulty.post("/embed", {"texts": [secret, f"{secret} @@poison@@"]})
    faulty.post("/embed", {"texts": [f"{secret} @@nan-always@@"]})
    faulty.post("/embed", {"texts": [secret], "prompt_name": "x" * 100_000})
    faulty.post("/embed", {"texts": {secret: secret}})
    requests.post(f"{faulty.url}/embed", data=f'{{"texts": "{secret}', timeout=60)
    requests.get(f"{faulty.url}/{secret}", timeout=60)
    log = faulty.log()
    assert "zebra" not in log
    assert "@@" not in log
    assert max(map(len, log.splitlines())) < 1000
