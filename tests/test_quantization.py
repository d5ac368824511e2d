"""`precision`, .npy and calibrated ranges, compared with sentence_transformers' quantize_embeddings."""

import base64
import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import requests
from sentence_transformers.util import quantize_embeddings

from embedding_service.errors import InvalidRequest, StartupError
from embedding_service.quantization import find_ranges, quantize, read_ranges
from tests.service import ROOT

TEXTS = ["How do I reset my password?", "Forgot login", "A third sentence", "and one more, a bit longer"]
DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(7).normal(size=(50, 20)).astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_every_bit_equals_the_librarys(vectors, precision):
    ranges = find_ranges(vectors[:40], "f")
    given = quantize_embeddings(
        vectors, precision=precision, ranges=np.array([ranges.minimum, ranges.maximum])
    )
    found = quantize(vectors, precision, ranges)
    assert found.dtype == given.dtype == np.dtype(DTYPES[precision])
    assert np.array_equal(found, given)


def test_a_constant_dimension_causes_no_division_by_zero():
    vectors = np.ones((3, 2), np.float32)
    ranges = find_ranges(vectors, "f")
    given = quantize_embeddings(vectors, precision="int8", ranges=np.ones((2, 2), np.float32))
    assert np.array_equal(quantize(vectors, "int8", ranges), given)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_8_bits_need_ranges_for_as_many_dimensions(vectors, precision):
    with pytest.raises(
        InvalidRequest, match=r"^precision is u?int8, which needs calibrated ranges: set INT8"
    ):
        quantize(vectors, precision)
    with pytest.raises(InvalidRequest, match="ranges are for 20 dimensions, not 10"):
        quantize(vectors[:, :10], precision, find_ranges(vectors, "f"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{}", "was not written by `embedding-service calibrate`"),
        ('{"fingerprint": "other", "minimum": [], "maximum": []}', "calibrated with another model"),
    ],
    ids=["missing", "something else", "other model"],
)
def test_an_unusable_file_of_ranges_stops_the_start(tmp_path, content, reason):
    path = tmp_path / "ranges.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartupError, match=reason):
        read_ranges(path, "f")


def ask(service, **fields):
    return requests.post(f"{service.url}/embed", json={"texts": TEXTS} | fields, timeout=60)


def floats(service):
    return np.array(ask(service).json()["embeddings"], np.float32)


@pytest.mark.parametrize("precision", ["float32", "float16", "binary", "ubinary"])
def test_embed_returns_the_requested_precision(service, precision):
    expected = floats(service)
    if precision == "float16":
        expected = expected.astype(np.float16)
    else:
        expected = quantize_embeddings(expected, precision=precision)
    body = ask(service, precision=precision).json()
    assert body["dimension"] == 384
    assert np.array_equal(np.array(body["embeddings"], DTYPES[precision]), expected)
    encoded = ask(service, precision=precision, encoding_format="base64").json()["embeddings"]
    decoded = [np.frombuffer(base64.b64decode(one), DTYPES[precision]) for one in encoded]
    assert np.array_equal(decoded, expected)
    response = requests.post(
        f"{service.url}/embed",
        json={"texts": TEXTS, "precision": precision},
        headers={"Accept": "application/x-npy"},
        timeout=60,
    )
    array = np.load(io.BytesIO(response.content))
    assert response.headers["Content-Type"] == "application/x-npy"
    assert response.headers["x-model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (array.dtype, response.headers["x-truncated-texts"]) == (np.dtype(DTYPES[precision]), "0")
    assert np.array_equal(array, expected)


def test_an_error_is_json_even_if_the_caller_accepts_npy(service):
    response = requests.post(
        f"{service.url}/embed", json={"texts": []}, headers={"Accept": "application/x-npy"}, timeout=60
    )
    assert (response.status_code, response.json()["field"]) == (400, "texts")


def test_8_bits_without_ranges_are_rejected(service):
    response = ask(service, precision="int8")
    assert (response.status_code, response.json()["field"]) == (400, "precision")
    answer = requests.post(
        f"{service.url}/v1/embeddings", json={"input": "a", "output_dtype": "uint8"}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "output_dtype")


def ask_openai(service, **fields):
    answer = requests.post(f"{service.url}/v1/embeddings", json={"input": TEXTS} | fields, timeout=60)
    return [row["embedding"] for row in answer.json()["data"]]


def test_openais_route_has_voyages_output_dtype(service):
    expected = quantize_embeddings(floats(service), precision="ubinary")
    assert ask_openai(service, output_dtype="ubinary") == expected.tolist()


def test_openais_route_has_float16_too(service, oracle):
    expected = oracle.encode(TEXTS, normalize_embeddings=True).astype(np.float16)
    numbers = np.array(ask_openai(service, output_dtype="float16"), np.float16)
    # The service's float32 may be rounded to the neighbour of the oracle's float16.
    assert np.allclose(numbers, expected, rtol=2**-10, atol=1e-5)
    assert np.array_equal(numbers, floats(service).astype(np.float16))
    encoded = ask_openai(service, output_dtype="float16", encoding_format="base64")
    assert np.array_equal([np.frombuffer(base64.b64decode(one), np.float16) for one in encoded], numbers)


def test_calibrate_and_serve_in_8_bits(tmp_path, start):
    texts = [line for line in (ROOT / "benchmarks" / "sentences.txt").read_text().splitlines() if line][:200]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    command = [sys.executable, "-m", "embedding_service", "calibrate", str(tmp_path / "texts.txt")]
    output = tmp_path / "ranges.json"
    done = subprocess.run(
        [*command, "-o", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"INT8_RANGES={output}" in done.stdout
    service = start(INT8_RANGES=str(output)).wait_ready()
    kept = json.loads(output.read_text())
    ranges = np.array([kept["minimum"], kept["maximum"]])
    for precision in ("int8", "uint8"):
        found = np.array(ask(service, precision=precision).json()["embeddings"])
        expected = quantize_embeddings(floats(service), precision=precision, ranges=ranges)
        assert np.array_equal(found, expected)
    info = requests.get(f"{service.url}/info", timeout=60).json()
    assert info["fingerprint"] != kept["fingerprint"]


def test_errors_of_texts_need_json(service):
    response = requests.post(
        f"{service.url}/embed",
        json={"texts": TEXTS, "on_error": "null"},
        headers={"Accept": "application/x-npy"},
        timeout=60,
    )
    assert (response.status_code, response.json()["field"]) == (400, "on_error")


def test_calibrate_requires_enough_texts(tmp_path):
    (tmp_path / "few.txt").write_text("one\n\ntwo\n")
    command = [sys.executable, "-m", "embedding_service", "calibrate", str(tmp_path / "few.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        78,
        f"{tmp_path}/few.txt has 2 texts; at least 100 are needed",
    )


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_a_gzip_body_is_read(service, encoding):
    body = gzip.compress(json.dumps({"texts": TEXTS}).encode())
    answer = requests.post(
        f"{service.url}/embed", data=body, headers={"Content-Encoding": encoding}, timeout=60
    )
    assert np.array_equal(np.array(answer.json()["embeddings"], np.float32), floats(service))
