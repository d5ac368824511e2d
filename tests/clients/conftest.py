"""Fixtures of the conformance tests: texts of all kinds, and a service whose model has prompts."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.service import SharedService

PROMPTS = {"query": "query: ", "document": "passage: ", "title": "title: "}

TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "",
    "a",
    "東京は日本の首都です 👩‍👩‍👧",
    "word " * 400,
    "line one\nline two\ttab \x00 null",
]


@pytest.fixture(scope="session")
def close(oracle):
    """Assert that vectors equal the oracle's for the texts, within 1e-5."""

    def check(vectors, texts, model=oracle, **arguments) -> None:
        expected = model.encode(texts, **{"normalize_embeddings": True} | arguments)
        assert np.shape(vectors) == expected.shape
        assert np.abs(np.array(vectors, np.float32) - expected).max() < 1e-5

    return check


@pytest.fixture(scope="session")
def model_name(service) -> str:
    return service.health()[1]["model"]


@pytest.fixture(scope="session")
def prompted_folder(model_folder: Path, tmp_path_factory) -> Path:
    """The default model with three prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    path = folder / "config_sentence_transformers.json"
    config = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(config | {"prompts": PROMPTS}))
    return folder


@pytest.fixture(scope="session")
def prompted_oracle(prompted_folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(prompted_folder), device="cpu")


@pytest.fixture(scope="session")
def prompted(own_process, prompted_folder):
    """A service with the prompted model, one for the whole run."""
    return SharedService("prompted", EMBEDDING_MODEL=str(prompted_folder))
