"""Number formats, prompts and means."""

import json

import numpy as np
import pytest
import requests
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

from tests.bulk.running import Run, read_lines, write_corpus


@pytest.mark.process
@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("precision", ["float16", "ubinary"])
def test_another_number_format(service, oracle, tmp_path, ending, precision):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / f"vectors.{ending}"
    texts = write_corpus(corpus, 20)
    with corpus.open("a") as file:
        file.write('{"text": null}\n')
    run = Run(corpus, "-o", output, "--url", service.url, "--precision", precision)
    assert run.wait() == 3, run.said
    if ending == "npy":
        found = np.load(output)[:20]
    else:
        table = parquet.read_table(output).to_pylist() if ending == "parquet" else read_lines(output)
        assert table[20]["embedding"] is None
        found = np.array([row["embedding"] for row in table[:20]])
    vectors = oracle.encode(texts, normalize_embeddings=True)
    if precision == "float16":
        assert np.abs(found.astype(np.float32) - vectors).max() < 1e-3
    else:
        expected = quantize_embeddings(vectors, precision=precision)
        differing = np.unpackbits(found.astype(np.uint8) ^ expected).sum()
        # A number next to 0 may have either sign.
        assert differing <= 2
    if ending == "npy":
        assert np.load(output).dtype == {"float16": np.float16, "ubinary": np.uint8}[precision]


@pytest.mark.process
@pytest.mark.parametrize("here", [False, True], ids=["service", "in this process"])
def test_a_prompt(service, oracle, tmp_path, here):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "vectors.npy"
    texts = write_corpus(corpus, 5)
    run = Run(corpus, "-o", output, "--prompt", "find: ", *([] if here else ["--url", service.url]))
    assert run.wait() == 0, run.said
    expected = oracle.encode(texts, prompt="find: ", normalize_embeddings=True)
    assert np.abs(np.load(output) - expected).max() < 1e-5


@pytest.mark.process
def test_int8_without_ranges_does_not_start(service, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, 3)
    run = Run(corpus, "-o", tmp_path / "vectors.npy", "--url", service.url, "--precision", "int8")
    assert run.wait() == 2
    assert "--precision int8 needs the setting INT8_RANGES" in run.said
    assert not (tmp_path / "vectors.npy").exists()


@pytest.mark.process
def test_ranges_of_another_model_are_rejected(service, tmp_path):
    ranges, corpus = tmp_path / "ranges.json", tmp_path / "corpus.jsonl"
    numbers = {"minimum": [-1.0] * 384, "maximum": [1.0] * 384}
    ranges.write_text(json.dumps({"fingerprint": "another"} | numbers))
    write_corpus(corpus, 3)
    arguments = (corpus, "-o", tmp_path / "vectors.npy", "--url", service.url, "--precision", "int8")
    run = Run(*arguments, INT8_RANGES=str(ranges))
    assert run.wait() == 2
    assert "was calibrated with another model" in run.said
    own = requests.get(f"{service.url}/info", timeout=60).json()["fingerprint"]
    ranges.write_text(json.dumps({"fingerprint": own} | numbers))
    run = Run(*arguments, INT8_RANGES=str(ranges))
    assert run.wait() == 0, run.said
    assert np.load(tmp_path / "vectors.npy").dtype == np.int8


@pytest.mark.process
@pytest.mark.parametrize("here", [True, False], ids=["here", "at a service"])
def test_over_long_texts_become_the_mean_of_their_pieces(service, tmp_path, here):
    long = " ".join(f"word{number % 100} and more" for number in range(400))
    (tmp_path / "corpus.txt").write_text(f"{long}\nshort\n")
    output = tmp_path / "vectors.npy"
    where = [] if here else ["--url", service.url]
    run = Run(tmp_path / "corpus.txt", "-o", output, "--overflow", "mean", *where)
    assert run.wait() == 0, run.said
    body = {"texts": [long, "short"], "overflow": "mean"}
    answer = requests.post(f"{service.url}/embed", json=body, timeout=60).json()
    assert answer["usage"]["chunks"] > 2
    assert np.abs(np.load(output) - np.array(answer["embeddings"])).max() < 1e-5
