"""Bodies that are malformed, strange, too large or random: the response is always JSON and never a 5xx."""

import json
import random
import threading
from typing import Any

import numpy as np
import pytest
import requests

from tests.faults.load import Client
from tests.reliability import record

MALFORMED = {
    "not JSON": b"texts=hello",
    "cut off": b'{"texts": "hel',
    "NaN": b'{"texts": NaN}',
    "an infinite number": b'{"texts": "a", "dimensions": Infinity}',
    "100,000 deep": b'{"texts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "bad UTF-8": b'{"texts": "\xff\xfe"}',
    "a lone surrogate": b'{"texts": "\\ud800"}',
    "a half pair": b'{"texts": "\\udc00\\ud800"}',
    "a number": b'{"texts": 1}',
    "null": b'{"texts": null}',
    "null among texts": b'{"texts": ["a", null]}',
    "a nested list": b'{"texts": [["a"]]}',
    "an empty list": b'{"texts": []}',
    "a list at the top": b'["a"]',
    "nothing": b"",
    "no texts": b"{}",
    "a huge number": b'{"texts": "a", "dimensions": 1' + b"0" * 5000 + b"}",
    "two documents": b'{"texts": "a"}{"texts": "b"}',
    "a byte order mark in UTF-16": '{"texts": "a"}'.encode("utf-16"),
}


def test_malformed_bodies_do_not_affect_other_requests(service, oracle):
    """Each gets a 400 that says where the error is, while good requests run beside it."""
    expected = oracle.encode(["a neighbour"], normalize_embeddings=True)
    stop = threading.Event()
    wrong: list[object] = []
    good = 0

    def neighbour() -> None:
        nonlocal good
        while not stop.is_set():
            response = service.post("/embed", {"texts": "a neighbour"})
            if response.status_code != 200 or np.abs(response.json()["embeddings"] - expected).max() > 1e-5:
                wrong.append(response.text)
            good += 1

    thread = threading.Thread(target=neighbour)
    thread.start()
    try:
        for name, raw in MALFORMED.items():
            response = requests.post(f"{service.url}/embed", data=raw, timeout=60)
            assert response.status_code == 400, (name, response.text)
            assert response.json()["error_type"] == "validation", name
            assert response.json()["request_id"] == response.headers["X-Request-ID"]
    finally:
        stop.set()
        thread.join()
    assert not wrong
    record(
        "malformed bodies",
        "; ".join(MALFORMED),
        len(MALFORMED),
        f"each 400, in JSON that says where the fault is; {good} concurrent requests answered correctly",
    )


def test_a_text_of_a_million_characters_is_rejected_cheaply(service):
    response = service.post("/embed", {"texts": ["short", "a" * 1_000_000]})
    assert response.status_code == 413
    assert "texts[1] has 1000000 characters" in response.json()["error"]
    record(
        "a text of 1,000,000 characters",
        "as the second of two",
        1,
        f"413 that names it after {response.elapsed.total_seconds() * 1e3:.0f} ms",
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_strange_texts_are_embedded_as_sentence_transformers_does(service, oracle, count):
    """Null bytes, emoji, right-to-left text, the empty text, and texts of random Unicode."""
    numbers = random.Random(1)
    planes = [(0x20, 0x7F), (0xA0, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x1FFFF)]
    strange = ["", "\x00", "a\x00b", "👩‍👩‍👧 🏳️‍🌈", "שלום עולם مرحبا"]
    strange += ["\u202eevil", "\ufeff", "\n\t ", "a" * 99_000]
    strange += [
        "".join(chr(numbers.randint(*numbers.choice(planes))) for _ in range(numbers.randint(1, 8)))
        for _ in range(count - len(strange))
    ]
    vectors: list[list[float]] = []
    for start in range(0, len(strange), 2500):
        response = service.post("/embed", {"texts": strange[start : start + 2500]})
        assert response.status_code == 200, response.text
        vectors += response.json()["embeddings"]
    sample = [*range(9), *numbers.sample(range(9, count), count // 10)]
    expected = oracle.encode([strange[i] for i in sample], normalize_embeddings=True)
    difference = np.abs(np.array(vectors)[sample] - expected).max()
    assert difference < 1e-5
    record(
        "null bytes, emoji, right-to-left, empty text, all of Unicode",
        f"{count:,} texts",
        count,
        f"all embedded; the largest difference from sentence-transformers in {len(sample):,} of them "
        f"{difference:.0e}",
    )


ROUTES: dict[str, dict[str, Any]] = {
    "/embed": {"texts": ["hello", "world"], "normalize": True, "dimensions": 8, "encoding_format": "base64"},
    "/": {"inputs": "hello", "truncate": True, "prompt_name": None},
    "/v1/embeddings": {"input": ["hello"], "model": "m", "encoding_format": "float", "user": "u"},
    "/api/embed": {"model": "m", "input": ["hello", ""], "truncate": True},
    "/vectors": {"text": "hello", "config": {"task_type": "query"}},
    "/tokenize": {"inputs": ["hello"], "add_special_tokens": True},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}},
}
STRANGE = [
    *(None, True, False, 0, -1, 1e308, 10**30, "", "x", "\x00", "é" * 50, [], {}, [[]], [None], [1, "a"]),
    *({"a": {"b": []}}, ["a"] * 50, [["a"], ["b"]], {"": ""}, [1.5] * 9, "base64", "\ud83d\ude00"),
]


def fuzzed(numbers: random.Random) -> tuple[str, bytes]:
    """A route, and a valid body with some values replaced, and perhaps with bytes changed, cut or doubled."""
    path = numbers.choice(list(ROUTES))
    payload = dict(ROUTES[path])
    for _ in range(numbers.randint(0, 3)):
        payload[numbers.choice([*payload, "texts", "input", "inputs", "dimensions"])] = numbers.choice(
            STRANGE
        )
    raw = bytearray(json.dumps(payload, ensure_ascii=numbers.random() < 0.5).encode("utf-8", "replace"))
    how = numbers.random()
    if how < 0.3:
        for _ in range(numbers.randint(1, 5)):
            raw[numbers.randrange(len(raw))] = numbers.randrange(256)
    elif how < 0.4:
        del raw[numbers.randrange(len(raw)) :]
    elif how < 0.45:
        raw *= 2
    return path, bytes(raw)


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.long)])
def test_fuzzed_bodies_never_make_a_5xx_and_always_get_json(service, count):
    numbers = random.Random(count)
    client = Client(service.port)
    statuses: dict[int, int] = {}
    for _ in range(count):
        path, raw = fuzzed(numbers)
        status, headers, answer = client.embed(raw, path)
        # 424 is TEI's status for a fault of ours.
        assert status < 500 and status != 424, (path, raw, answer)
        assert headers["content-type"].startswith("application/json"), (path, raw, headers)
        json.loads(answer)
        statuses[status] = statuses.get(status, 0) + 1
    client.close()
    assert statuses.get(200) and len(statuses) > 2
    seen = ", ".join(f"{number} times {status}" for status, number in sorted(statuses.items()))
    record("fuzzed bodies", f"on {len(ROUTES)} routes", count, f"{seen}; always JSON, never a 5xx")
