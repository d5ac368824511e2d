"""Rows of .txt and .csv files, damaged ones too."""

import csv
import io
import json

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import strategies

from embedding_service.bulk.paths import Paths
from embedding_service.bulk.rows import Row
from embedding_service.bulk.source import InputFile
from tests.bulk.running import Numbers, Run, end_midway
from tests.fakes import Served


def test_every_line_of_a_txt_file_is_a_row(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\n\xff\n  spaces  \nlast")
    found = list(InputFile(path, "text").rows())
    assert [(row.number, row.line, row.text) for row in found if not row.error] == [
        (0, 1, "first"),
        (1, 2, ""),
        (3, 4, "  spaces  "),
        (4, 5, "last"),
    ]
    assert found[2] == Row(2, 3, error="not UTF-8 at byte 0")
    assert InputFile(path, "text").count() == 5


def test_csv_records_have_the_line_on_which_they_begin(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'id,text\n1,"a\nb"\n2\n\n3,\xff\n4,d\n')
    found = list(InputFile(path, "text").rows())
    assert [(row.number, row.line, row.text) for row in found] == [
        (0, 2, "a\nb"),
        (1, 4, ""),
        (2, 6, ""),
        (3, 7, "d"),
    ]
    assert [bool(row.error) for row in found] == [False, True, True, False]
    assert InputFile(path, "text").count() == 4


CSV_FAULTS = {
    b'text,id\na,1\n"unclosed,2\nb,3\nc,4\nd,5\n': ["a", 3, "b", "c", "d"],
    b'text,id\n"a"b,1\nc,2\n': [2, "c"],
    b'text,id\n"a"b,1\n"unclosed,2\nb,3\n"c"d,2\nd,5\n"e': [2, 3, "b", 5, "d", 7],
    b'id,text,z\n1,"a\nb","unclosed\n2,x,3\n': [3, "x"],
    b'id,text,z\n1,"unclosed,3\n2,",",3\n4,5,6\n': [2, ",", "5"],
    b'text,id\n"unclosed,1\nb,2\nc"\nd,3\n': [2, "b", 'c"', "d"],
    b'\xef\xbb\xbftext,id\r\n"a\r\nb",1\r\n\r\n"c"x,2\r\nd,3\re,4\n\0,5': ["a\r\nb", 5, "d", "e", "\0"],
    b'text,id\na"b,1\n"c""d",2\n': ['a"b', 'c"d'],
    b'text,id\n"' + b"x" * (17 << 20) + b'",1\nb,2\n': [2, "b"],
    b'text,id\n"' + (b"x" * 999 + b"\n") * (17 << 10) + b"b,2\n": [2, "b"],
}


@pytest.mark.parametrize("content", CSV_FAULTS, ids=lambda content: content[:40].decode("latin-1"))
def test_quoting_faults_are_bad_rows_and_the_rows_after_them_are_kept(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    found = list(InputFile(path, "text").rows())
    assert [row.line if row.error else row.text for row in found] == CSV_FAULTS[content]
    assert [row.number for row in found] == list(range(len(found)))
    assert InputFile(path, "text").count() == len(found)


class Strict(msgspec.Struct):
    """What the csv module reads: the records before a fault with their lines, and where the fault is."""

    records: list[tuple[int, int, list[str]]]
    fault_lines: range

    @classmethod
    def read(cls, content: str) -> "Strict":
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        records, fault = [], range(0)
        while True:
            first = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return cls(records, fault)
            except csv.Error:
                return cls(records, range(first, reader.line_num + 1))
            if record:
                records.append((first, reader.line_num, record))


@hypothesis.given(
    table=strategies.lists(
        strategies.lists(strategies.text('ab", \n\ré\0', max_size=6), min_size=2, max_size=2)
    ),
    quoting=strategies.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    end=strategies.sampled_from(["\n", "\r\n"]),
    damages=strategies.lists(
        strategies.tuples(strategies.floats(0, 1), strategies.sampled_from(["", '"', "\n"]))
    ),
)
@hypothesis.settings(
    max_examples=500,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_damaged_csv_against_the_csv_module_in_strict_mode(tmp_path, table, quoting, end, damages):
    """Characters are deleted, and quotes and line ends inserted, before three intact records."""
    written = io.StringIO(newline="")
    csv.writer(written, quoting=quoting, lineterminator=end).writerows(table)
    damaged = written.getvalue()
    for place, what in damages:
        at = int(place * len(damaged))
        damaged = damaged[:at] + (what or "") + damaged[at + (not what) :]
    tail = ["tail 1", "tail 2", "tail 3"]
    content = f"text,id{end}{damaged}{end}" + "".join(f"{text},0{end}" for text in tail)
    path = tmp_path / "damaged.csv"
    path.write_bytes(content.encode())
    found = list(InputFile(path, "text").rows())

    strict = Strict.read(content)
    before = strict.records[1:]
    # A record over several lines with too many or too few fields has swallowed others.
    swallowed = [i for i, (first, last, record) in enumerate(before) if first != last and len(record) != 2]
    before = before[: swallowed[0]] if swallowed else before
    assert [(row.line, row.text) for row in found[: len(before)]] == [
        (line, record[0]) for line, _, record in before
    ]
    if swallowed:
        assert found[len(before)].line == strict.records[1 + swallowed[0]][0] and found[len(before)].error
    elif strict.fault_lines:
        assert found[len(before)].line in strict.fault_lines and found[len(before)].error
    else:
        assert len(found) == len(before)
    assert [row.text for row in found[-3:]] == tail
    assert [row.number for row in found] == list(range(len(found)))
    starts = [row.line for row in found]
    assert starts == sorted(set(starts))


@pytest.mark.process
def test_a_run_over_damaged_csv_resumes_exactly_where_it_stopped(tmp_path):
    corpus, output = tmp_path / "corpus.csv", tmp_path / "vectors.npy"
    texts = [f"{number}" if number % 7 else '"unclosed' for number in range(1, 20_001)]
    corpus.write_text("text,id\n" + "".join(f"{text},0\n" for text in texts))
    served = Served(engine := Numbers())
    try:
        end_midway(served.url, engine, corpus, "-o", output, rows=5000, spare=5000)
        finished = Run(corpus, "-o", output, "--url", served.url)
        assert finished.wait(300) == 3, finished.said
    finally:
        served.stop()
    expected = [float(text) if text.isdigit() else np.nan for text in texts]
    assert np.array_equal(np.load(output)[:, 0], expected, equal_nan=True)
    listed = [json.loads(line) for line in Paths(output).errors.read_text().splitlines()]
    assert [failure["line"] for failure in listed] == [
        i + 2 for i, text in enumerate(texts) if not text.isdigit()
    ]
