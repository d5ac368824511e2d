"""Every format of input gives the same texts, in constant memory."""

import gzip
import os
import sys
import tracemalloc

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from embedding_service.bulk import compression
from embedding_service.bulk.rows import Row
from embedding_service.bulk.source import FORMATS, InputFile
from embedding_service.engine import Embeddings, EmbedRequest, Timings
from tests.bulk.running import TEXTS, Run, main, written
from tests.fakes import FakeEngine, Served

PACK = {"": bytes, ".gz": gzip.compress, ".zst": compression.zstd.compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_texts_compressed_or_not(tmp_path, kind, packed):
    path = tmp_path / f"corpus.{kind}{packed}"
    path.write_bytes(PACK[packed](written(kind)))
    expected = [text.replace("\n", " ") for text in TEXTS] if kind == "txt" else TEXTS
    source = InputFile(path, "text")
    assert [row.text for row in source.rows()] == expected
    assert source.count() == len(TEXTS)


@pytest.mark.process
@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", FORMATS)
def test_standard_input_gives_the_same_vectors_as_a_file(tmp_path, kind, packed):
    corpus, output = tmp_path / f"corpus.{kind}{packed}", tmp_path / "vectors.npy"
    corpus.write_bytes(PACK[packed](written(kind)))
    served = Served(Lengths())
    try:
        with corpus.open("rb") as file:
            finished = Run("-", "-o", output, "--url", served.url, "--format", kind, stdin=file)
            assert finished.wait() == 0, finished.said
    finally:
        served.stop()
    assert np.load(output)[:, 0].tolist() == [len(text) for text in TEXTS]


class Lengths(FakeEngine):
    """Embeds a text as its length."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = np.array([[len(text), 0, 1] for text in request.texts], np.float32)
        return Embeddings(vectors=vectors, tokens=1, truncated=[], timings=Timings())


@pytest.mark.parametrize("cut", [1, 9])
@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "parquet", "csv.gz"])
def test_a_truncated_input_is_detected_before_the_run(tmp_path, monkeypatch, capsys, kind, cut):
    corpus = tmp_path / f"corpus.{kind}"
    kind, _, packed = kind.partition(".")
    corpus.write_bytes(PACK[packed and f".{packed}"](written(kind))[:-cut])
    assert main(monkeypatch, corpus, "-o", tmp_path / "v.npy") == 2
    said = capsys.readouterr().err
    assert str(corpus) in said and said.count("\n") == 1


REFUSED = {
    "wrong.jsonl": (
        b'{"id": 1, "body": "a"}\n' * 150,
        [],
        "none of the first 100 rows has a text",
        "id, body",
    ),
    "wrong.json": (b'[{"id": 1, "body": "a"}]', [], "none of the first 1 rows", "its fields: id, body"),
    "number.jsonl": (b'{"id": 1, "text": "a"}\n', ["--field", "id"], "'id' is not a string but int", ""),
    "lines.jsonl": (b"plain text\n" * 3, [], "not valid JSON", "--format"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', [], "not a JSON array", "--format jsonl"),
    "trailing.json": (b'["a"] ["b"]', [], "there is something after the array", ""),
    "empty.json": (b" \n", [], "the file is empty", ""),
    "empty.csv": (b"", [], "the file is empty", ""),
    "header.csv": (b'text,"id\na,1\n', [], "the header cannot be read, line 1", "never closed"),
    "semicolon.csv": (b"id;text\n1;a\n", [], "there is no column 'text'; the columns are id;text", ""),
    "wide.csv": (b"text\na\n", ["--delimiter", "::"], "--delimiter '::' must be one character", ""),
    "lines.txt": (b"a\n", ["--delimiter", ";"], "--delimiter is for csv and tsv", "read as txt"),
    "utf16.csv": ("text\na\n".encode("utf-16"), [], "it is UTF-16; only UTF-8 is supported", ""),
    "utf16.jsonl": ('"a"\n'.encode("utf-16"), [], "it is UTF-16; only UTF-8 is supported", ""),
    "text.parquet": (b"PAR1 not", [], "not a valid parquet file", ""),
    "numbers.parquet": (written("parquet"), ["--field", "id"], "the column 'id' holds int64, not text", ""),
    "names.parquet": (
        written("parquet"),
        ["--field", "body"],
        "no column 'body'; the columns are id, text",
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_without_texts_is_rejected_in_one_line_that_lists_its_fields(
    tmp_path, monkeypatch, capsys, name
):
    content, options, *words = REFUSED[name]
    corpus = tmp_path / name
    corpus.write_bytes(content)
    assert main(monkeypatch, corpus, "-o", tmp_path / "v.npy", *options) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("module", ["pyarrow", "backports.zstd"])
def test_a_missing_package_is_named_in_one_line(tmp_path, monkeypatch, capsys, module):
    kind = "parquet" if module == "pyarrow" else "zst"
    corpus = tmp_path / f"corpus.{kind}"
    corpus.write_bytes(written("parquet") if kind == "parquet" else PACK[".zst"](b'"a"\n'))
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(compression, "zstd", None)
    assert (
        main(
            monkeypatch,
            corpus,
            "-o",
            tmp_path / "v.npy",
            *([] if kind == "parquet" else ["--format", "jsonl"]),
        )
        == 2
    )
    said = capsys.readouterr().err
    assert f"pip install {module}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "unused",
    [b"1e999", b"NaN", b"-Infinity", b'"\\ud800"', b'"\xff"', b"[" * 500 + b"]" * 500, b"1" * 400],
    ids=lambda unused: unused[:9].decode("latin-1"),
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_an_unused_field_never_makes_a_row_bad(tmp_path, kind, unused):
    path = tmp_path / f"corpus.{kind}"
    line = b'{"x": ' + unused + b', "text": "a"}'
    path.write_bytes(b"[" + line + b"]" if kind == "json" else line)
    assert list(InputFile(path, "text").rows()) == [Row(0, 1, "a")]


def test_json_elements_have_line_numbers_and_bad_ones_fail_alone(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_bytes(
        b'\xef\xbb\xbf\n [\n"a [,] \\" b",\n\n {"text": nope}, {"text":\n"\xff"},7,'
        b'{"text": "c", "x": [{}]}\n,]\n'
    )
    found = list(InputFile(path, "text").rows())
    assert [(row.line, row.text) for row in found if not row.error] == [(3, 'a [,] " b'), (6, "c")]
    assert [(row.line, row.error[:24]) for row in found if row.error] == [
        (5, "not valid JSON: JSON is "),
        (5, "not valid JSON: 'utf-8' "),
        (6, "'text' is not a string b"),
        (7, "the line is blank"),
    ]
    path.write_bytes(b"[ \n]\n")
    assert list(InputFile(path, "text").rows()) == []


def test_parquet_values_without_a_text_are_bad_rows(tmp_path):
    path = tmp_path / "corpus.parquet"
    values = pyarrow.array([b"a", None, b"\xff", b"d"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": values}), path)
    assert [(row.text, row.error) for row in InputFile(path, "text").rows()] == [
        ("a", ""),
        ("", "the value is null"),
        ("", "not UTF-8 at byte 0"),
        ("d", ""),
    ]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()}), path)
    assert [row.text for row in InputFile(path, "text").rows()] == ["x", "y", "x"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "jsonl.zst", "csv"])
def test_only_a_part_of_the_file_is_in_memory(tmp_path, kind):
    path, rows = tmp_path / f"corpus.{kind}", 40_000
    line = b'"' + b"x" * 1000 + b'"'
    content = (
        b"[" + b",\n".join([line] * rows) + b"]"
        if kind == "json"
        else (b"text\n" if kind == "csv" else b"") + (line + b"\n") * rows
    )
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](content))
    del content
    tracemalloc.start()
    count = sum(1 for _ in InputFile(path, "text").rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == rows and peak < 4 << 20


@pytest.mark.slow
def test_an_endless_line_is_a_bad_row_and_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "endless.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n"after it"\n')
    tracemalloc.start()
    found = list(InputFile(path, "text").rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(row.text, row.error) for row in found] == [
        ("", "the line is longer than 16777216 bytes"),
        ("after it", ""),
    ]
    assert peak < 100 << 20
