"""A start that finds its model prepared: what its processes import, and what they share."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")

PREPARING = {"torch", "transformers", "sentence_transformers"}


def test_no_process_of_a_prepared_start_imports_torch(start, oracle, tmp_path):
    cache = str(tmp_path / "cache")
    assert start(CACHE_FOLDER=cache).wait_ready().stop() == 0
    # Python then prints every module that it imports, in each process.
    service = start(CACHE_FOLDER=cache, PYTHONPROFILEIMPORTTIME="1", WEB_CONCURRENCY="2").wait_ready()
    answer = service.post("/embed", {"texts": ["hello"], "normalize": True}).json()
    expected = oracle.encode(["hello"], normalize_embeddings=True)
    assert np.abs(np.array(answer["embeddings"]) - expected).max() < 1e-5

    imported = re.findall(r"^import time:.*\| *(\w+)\b", service.log(), re.MULTILINE)
    assert {"tokenizers", "openvino", "flask"} <= set(imported)
    assert not PREPARING & set(imported)
    mapped = Path(f"/proc/{service.model_process().pid}/maps").read_text()
    assert "openvino" in mapped
    assert "torch" not in mapped

    # What the master imported before the fork is in memory once.
    for worker in service.web_workers():
        memory = worker.memory_full_info()
        assert memory.uss < memory.rss / 2
