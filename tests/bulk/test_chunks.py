"""A run with a row for each piece of a long text."""

import json
import tracemalloc

import msgspec
import numpy as np
import pytest
import requests
from pyarrow import parquet

from embedding_service.bulk.embedders import Description, Embedding
from embedding_service.bulk.part import PartFile
from embedding_service.bulk.paths import Paths
from embedding_service.bulk.pipeline import Patient, run
from embedding_service.bulk.rows import Row
from embedding_service.engine import Chunk, Embeddings, EmbedRequest
from embedding_service.errors import TooLarge
from tests.bulk.running import CHUNKED, JOB, Numbers, Run, end_midway, main, read_lines
from tests.fakes import Served


class InChunks(Numbers):
    """Cuts a text into as many chunks as it has characters; the vector of a chunk starts with its digit."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        if request.overflow != "chunks":
            return super().embed(request)
        chunks = [[Chunk(i, i + 1, 1) for i in range(len(text))] for text in request.texts]
        count = sum(map(len, chunks))
        if request.max_chunks is not None and count > request.max_chunks:
            raise TooLarge(f"make {count} pieces; at most {request.max_chunks} are allowed", field="texts")
        digits = [digit for text in request.texts for digit in text]
        return msgspec.structs.replace(
            super().embed(msgspec.structs.replace(request, texts=digits)), chunks=chunks
        )


@pytest.mark.process
def test_each_chunk_of_20_000_texts_is_there_once_after_two_kills(tmp_path):
    count, corpus, output = 20_000, tmp_path / "corpus.txt", tmp_path / "vectors.npy"
    corpus.write_text("".join(f"{number + 1}\n" for number in range(count)))
    expected = [(n, i, int(digit)) for n in range(count) for i, digit in enumerate(str(n + 1))]
    served = Served(engine := InChunks())
    command = (corpus, "-o", output, "--overflow", "chunks", "--batch", 64)
    try:
        for done in (20_000, 60_000):
            killed = end_midway(served.url, engine, *command, rows=done, spare=10_000)
        finished = Run(*command, "--url", served.url)
        assert finished.wait(300) == 0, finished.said
    finally:
        served.stop()
    assert f"Wrote {len(expected)} rows for 20000 texts" in finished.said
    places = read_lines(Paths(output).chunks)
    digits = np.load(output)[:, 0].astype(int).tolist()
    found = [(place["row"], place["start"], digit) for place, digit in zip(places, digits, strict=True)]
    assert found == expected
    assert max(killed.peak_mib, finished.peak_mib) < 200


@pytest.mark.process
@pytest.mark.parametrize(
    ("here", "ending"),
    [(True, "npy"), (False, "npy"), (False, "jsonl"), (False, "parquet")],
    ids=["here", "npy", "jsonl", "parquet"],
)
def test_over_long_texts_become_a_row_for_each_chunk(service, tmp_path, here, ending):
    long = " ".join(f"wörd{number % 100} and more" for number in range(400))
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, [long, 7, "short", long, ""])))
    output = tmp_path / f"vectors.{ending}"
    where = [] if here else ["--url", service.url]
    options = ["--overflow", "chunks", "--chunk-overlap", 20, "--batch", 2]
    run = Run(tmp_path / "corpus.jsonl", "-o", output, *options, *where)
    assert run.wait() == 3, run.said
    assert [failure["row"] for failure in read_lines(Paths(output).errors)] == [1]

    body = {"texts": [long, "short", long, ""], "overflow": "chunks", "chunk_overlap": 20}
    answer = requests.post(f"{service.url}/embed", json=body, timeout=60).json()
    expected = [([0, 2, 3, 4][chunk["text"]], chunk["start"], chunk["end"]) for chunk in answer["chunks"]]
    bad = expected.index(next(place for place in expected if place[0] == 2))
    expected.insert(bad, (1, None, None))
    if ending == "npy":
        table, vectors = read_lines(Paths(output).chunks), np.load(output)
        assert np.isnan(vectors[bad]).all()
        vectors = np.delete(vectors, bad, axis=0)
    else:
        assert not Paths(output).chunks.exists()
        table = read_lines(output) if ending == "jsonl" else parquet.read_table(output).to_pylist()
        assert [row["error"] is not None for row in table] == [place[0] == 1 for place in expected]
        vectors = np.array([row["embedding"] for row in table if row["embedding"] is not None])
    assert [(row["row"], row["start"], row["end"]) for row in table] == expected
    assert len(expected) > 10
    assert np.abs(vectors - np.array(answer["embeddings"])).max() < 1e-5


def test_a_text_of_more_chunks_than_the_service_takes_is_a_bad_row(tmp_path, monkeypatch, capsys):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "v.jsonl"
    corpus.write_text("12\n1234567\n890\n")
    served = Served(InChunks(), max_texts_per_request=6)
    try:
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--overflow", "chunks") == 3
    finally:
        served.stop()
    said = capsys.readouterr().err
    assert "line 2: texts make 7 pieces; at most 6 are" in said
    assert [row["row"] for row in read_lines(output)] == [0, 0, 1, 2, 2, 2]


def test_a_run_without_chunks_removes_the_list_of_an_earlier_one(tmp_path, monkeypatch):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "v.npy"
    corpus.write_text("12\n3\n")
    served = Served(InChunks())
    try:
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--overflow", "chunks") == 0
        assert len(read_lines(Paths(output).chunks)) == len(np.load(output)) == 3
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--restart") == 0
    finally:
        served.stop()
    assert len(np.load(output)) == 2
    assert not Paths(output).chunks.exists()


class Instant:
    """Embeds without taking any time."""

    def describe(self) -> Description:
        return Description(model_name="m", fingerprint="f", max_client_batch_size=256)

    def embed(self, texts: list[str]) -> list[Embedding]:
        return [Embedding(np.ones((1, 2), np.float32))] * len(texts)

    def close(self) -> None:
        pass


class InstantChunks(Instant):
    """Makes three chunks of each text."""

    def embed(self, texts: list[str]) -> list[Embedding]:
        return [Embedding(np.ones((3, 2), np.float32), [(0, 1), (1, 2), (2, 3)])] * len(texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("embedder", "job"), [(Instant(), JOB), (InstantChunks(), CHUNKED)], ids=["", "chunks"]
)
def test_memory_does_not_grow_with_the_rows(tmp_path, embedder, job):
    count, characters = 100_000, 300
    part = PartFile(tmp_path / "v.npy", job)
    many = (Row(number, number + 1, f"{number:{characters}}") for number in range(count))
    patient = Patient(embedder, 10)
    tracemalloc.start()
    assert sum(chunk.texts for chunk in run(many, patient, part, chunk_rows=256, in_flight=4)) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.texts == count
    part.close()
    PartFile(tmp_path / "v.npy", job).close()
    assert peak < count * characters / 10
