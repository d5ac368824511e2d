"""The commands in the README start the service, and it stops cleanly."""

import signal

import numpy as np


def test_python_app_py_serves_the_oracles_vectors(service, oracle):
    texts = ["hello", "The quick brown fox", "", "word " * 300, "東京 👩‍👩‍👧"]
    body = service.post("/embed", {"texts": texts}).json()
    expected = oracle.encode(texts, normalize_embeddings=True)
    assert np.abs(np.array(body["embeddings"]) - expected).max() < 1e-5


def test_sigterm_ends_every_process(start_without_model):
    running = start_without_model().wait_ready()
    processes = running.processes()
    assert running.stop(signal.SIGTERM) == 0
    assert not [process for process in processes if process.is_running() and process.status() != "zombie"]
