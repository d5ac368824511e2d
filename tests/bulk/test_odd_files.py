"""Odd files: duplicate columns, other encodings, Excel's first line, old line ends, and Parquet's types."""

import io
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from embedding_service.bulk import lines
from embedding_service.bulk.rows import MAX_BYTES
from embedding_service.bulk.source import InputFile
from embedding_service.errors import StartupError


def texts(folder: Path, name: str, content: bytes, field: str = "text", **options) -> list[str]:
    """The texts of a file; every row must be good, and `count` must agree."""
    path = folder / name
    path.write_bytes(content)
    source = InputFile(path, field, **options)
    rows = list(source.rows())
    assert not [row for row in rows if row.error]
    assert source.count() == len(rows)
    return [row.text for row in rows]


def table(**columns) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def twice(**columns) -> bytes:
    file = io.BytesIO()
    arrays = [pyarrow.array(values) for values in columns.values() for _ in range(2)]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, [name for name in columns for _ in range(2)]), file)
    return file.getvalue()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
def test_lines_end_alike_in_every_format(tmp_path, end, closed):
    last = end if closed else ""
    assert texts(tmp_path, "a.txt", (f"one{end}{end}three" + last).encode()) == ["one", "", "three"]
    records = [f'{{"text": "{word}"}}' for word in ("one", "two")]
    assert texts(tmp_path, "a.jsonl", (end.join(records) + last).encode()) == ["one", "two"]
    assert texts(tmp_path, "a.csv", (f"id,text{end}1,one{end}2,two" + last).encode()) == ["one", "two"]


def test_an_end_of_a_line_over_two_blocks_is_one(monkeypatch):
    content = b"one\r\ntwo\rthree\n\r\nfive"
    for size in range(1, len(content) + 1):
        monkeypatch.setattr(lines, "BLOCK_BYTES", size)
        rows = list(lines.read(io.BytesIO(content), bytes.decode))
        assert [row.text for row in rows] == ["one", "two", "three", "", "five"]


@pytest.mark.slow
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_line_is_too_long_from_the_same_byte_on_whatever_its_end(end):
    for size, is_bad in ((MAX_BYTES - 1, False), (MAX_BYTES, True), (2 * MAX_BYTES, True)):
        rows = list(lines.read(io.BytesIO(b"a" * size + end + b"b"), bytes.decode))
        assert bool(rows[0].error) is is_bad
        assert rows[1].text == "b"


@pytest.mark.parametrize("delimiter", ";,|\t")
def test_excels_first_line_names_the_delimiter(tmp_path, delimiter):
    content = f"sep={delimiter}\r\nid{delimiter}text\r\n1{delimiter}one\r\n"
    assert texts(tmp_path, "a.csv", content.encode()) == ["one"]


@pytest.mark.parametrize("kind", ["utf-16-le", "utf-16-be", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_utf_16_is_refused_with_and_without_a_byte_order_mark(tmp_path, kind, name):
    with pytest.raises(StartupError, match="it is UTF-16; only UTF-8 is supported"):
        texts(tmp_path, name, 'text\n"one", "tẅo"\n'.encode(kind))


def test_a_text_may_hold_zeros(tmp_path):
    assert texts(tmp_path, "a.txt", b"a\0b\0c\n\0\n") == ["a\0b\0c", "\0"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary(), pyarrow.large_binary()])
def test_parquet_text_may_be_stored_as_bytes(tmp_path, kind):
    assert texts(tmp_path, "a.parquet", table(text=pyarrow.array(["one", "tẅo"], kind))) == ["one", "tẅo"]


def test_parquet_text_may_be_a_field_of_a_struct(tmp_path):
    rows = [{"body": {"text": "one", "n": 1}}, {"body": {"text": "two", "n": 2}}]
    assert texts(tmp_path, "a.parquet", table(doc=rows), "doc.body.text") == ["one", "two"]
    dotted = table(**{"doc.text": ["one"], "doc": [{"text": "two"}]})
    assert texts(tmp_path, "a.parquet", dotted, "doc.text") == ["one"]


def test_a_struct_that_is_null_is_a_bad_row(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(table(doc=[{"text": "one"}, None]))
    assert [row.error for row in InputFile(path, "doc.text").rows()] == ["", "the value is null"]


def test_another_column_may_be_there_twice(tmp_path):
    assert texts(tmp_path, "a.csv", b"id,id,text\n1,2,one\n") == ["one"]


REFUSED = {
    "twice in csv": ("a.csv", b"text,text\n1,2\n", "text", "there are 2 columns 'text'; rename all but one"),
    "twice in parquet": ("a.parquet", twice(text=["a"]), "text", "there are 2 columns 'text'"),
    "a struct": ("a.parquet", table(doc=[{"a": "b"}]), "doc", "choose one of its fields: doc.a"),
    "no such field": (
        "a.parquet",
        table(doc=[{"a": "b"}]),
        "doc.b",
        "'doc' has no field 'b'; its fields are a",
    ),
    "not a struct": ("a.parquet", table(doc=["b"]), "doc.b", "the column 'doc' holds string, which has no"),
    "a list": ("a.parquet", table(doc=[["b"]]), "doc", "holds list<element: string>, not text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_column_that_is_not_one_text_a_row_is_refused_in_one_line(tmp_path, case):
    name, content, field, words = REFUSED[case]
    with pytest.raises(StartupError) as caught:
        texts(tmp_path, name, content, field)
    assert words in str(caught.value) and "\n" not in str(caught.value)
