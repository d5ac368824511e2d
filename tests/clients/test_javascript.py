"""Clients in JavaScript and strict TypeScript, and linters of the API's description."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import requests

from tests.conftest import require_program

pytestmark = pytest.mark.nightly

SOURCES = Path(__file__).with_name("javascript")
TEXT = "How do I reset my password?"
STRICT = [
    "--strict",
    "--module",
    "nodenext",
    "--target",
    "es2022",
    "--lib",
    "es2022,dom,dom.iterable",
    "--skipLibCheck",
]


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(service, tmp_path_factory) -> Path:
    """The packages of package.json, and the description of the API."""
    folder = shutil.copytree(SOURCES, tmp_path_factory.mktemp("javascript") / "project")
    run(folder, require_program("npm", "npm"), "install", "--no-audit", "--no-fund")
    (folder / "openapi.json").write_bytes(requests.get(f"{service.url}/openapi.json", timeout=60).content)
    return folder


def test_released_clients_get_the_vectors_of_sentence_transformers(project, service, oracle):
    vectors = json.loads(run(project, "node", "embed.mjs", service.url, TEXT))
    expected = oracle.encode(TEXT, normalize_embeddings=True)
    assert set(vectors) == {"openai", "ollama", "cohere", "huggingface"}
    for client, vector in vectors.items():
        assert np.abs(np.ravel(vector) - expected).max() < 1e-5, client


def test_a_generated_client_compiles_in_strict_mode_and_embeds(project, service, oracle):
    run(project, "npx", "openapi-typescript", "openapi.json", "-o", "api.ts")
    run(project, "npx", "tsc", *STRICT, "typed.mts")
    answer = json.loads(run(project, "node", "typed.mjs", service.url, TEXT))
    assert np.abs(answer["embeddings"][0] - oracle.encode(TEXT, normalize_embeddings=True)).max() < 1e-5


def test_linters_find_nothing_in_the_description(project):
    said = run(project, "npx", "redocly", "lint", "--extends=recommended", "openapi.json")
    assert "Warning" not in said
    (project / "rules.yaml").write_text('extends: ["spectral:oas"]\n')
    run(
        project,
        "npx",
        "spectral",
        "lint",
        "openapi.json",
        "--ruleset",
        "rules.yaml",
        "--fail-severity",
        "hint",
    )
