"""Random requests of mixed sizes and lengths from 16 clients: every vector equals the oracle's."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests

# Split here, since one line is more readable than a list.
VOCABULARY = "the of model river 東京 straße query fox embedding 42 quick λόγος naïve 👩‍👩‍👧 über vector"
WORDS = VOCABULARY.split(" ")


def texts(source: random.Random) -> list[str]:
    """1 to 12 texts, most of them short, and a few longer than the model's 256 tokens."""
    return [
        " ".join(source.choices(WORDS, k=min(400, int(source.lognormvariate(1.8, 1.0)))))
        for _ in range(source.choice([1, 1, 1, 2, 3, 12]))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.long)])
def test_random_requests_equal_the_oracle(service, oracle, count):
    source = random.Random(20_26)
    requests_texts = [texts(source) for _ in range(count)]
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=16))

    def ask(batch: list[str]) -> list[list[float]]:
        response = session.post(f"{service.url}/embed", json={"texts": batch}, timeout=120)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["count"] == len(batch)
        return body["embeddings"]

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, requests_texts))
    flat = [text for batch in requests_texts for text in batch]
    got = np.array([vector for answer in answers for vector in answer])
    expected = oracle.encode(flat, normalize_embeddings=True, show_progress_bar=False)
    assert np.abs(got - expected).max() < 1e-5
