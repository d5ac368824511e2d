"""Entries of the cache are found only for the same facts, and only whole."""

import os
from pathlib import Path

import pytest

from embedding_service.inference import prepared, warm_up
from embedding_service.inference.budget import BatchCost
from embedding_service.inference.prepared import read_cost, save_cost
from embedding_service.inference.store import KEPT, Entry, cpu_model
from tests.inference.running import load


def write(folder: Path) -> None:
    (folder / "content").write_text("right")


def entry(folder: Path, *facts: object) -> Entry:
    return Entry(str(folder), "kind", facts)


def test_an_entry_is_found_only_for_the_same_facts(tmp_path):
    entry(tmp_path, "model", 2).save(write)
    found = entry(tmp_path, "model", 2).find()
    assert found and (found / "content").read_text() == "right"
    assert entry(tmp_path, "model", 3).find() is None


def test_without_the_libraries_that_made_it_the_latest_entry_counts(tmp_path):
    for version in ("1", "2"):
        Entry(str(tmp_path), "kind", ["model"], [version]).save(write)
    older = Entry(str(tmp_path), "kind", ["model"], ["1"]).path
    os.utime(older, (1, 1))
    assert Entry(str(tmp_path), "kind", ["model"], ["3"]).find() is None
    assert Entry(str(tmp_path), "kind", ["model"], None).find() not in (None, older)
    assert Entry(str(tmp_path), "kind", ["other"], None).find() is None


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", ["content", "sums.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_dropped(tmp_path, file, damage):
    one = entry(tmp_path)
    one.save(write)
    DAMAGES[damage](one.path / file)
    assert one.find() is None
    one.save(write)
    assert one.find() == one.path


def test_a_file_too_many_and_an_entry_of_another_key_are_not_used(tmp_path):
    one, other = entry(tmp_path, 1), entry(tmp_path, 2)
    one.save(write)
    one.path.rename(other.path)
    assert other.find() is None
    one.save(write)
    (one.path / "more").write_text("")
    assert one.find() is None


def test_of_two_that_write_at_once_both_succeed(tmp_path):
    def write_twice(folder: Path) -> None:
        entry(tmp_path).save(write)
        write(folder)

    entry(tmp_path).save(write_twice)
    assert entry(tmp_path).find() is not None
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [entry(tmp_path).path.name]


def test_a_write_that_fails_midway_leaves_nothing(tmp_path):
    def half(folder: Path) -> None:
        write(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        entry(tmp_path).save(half)
    assert list((tmp_path / "kind").iterdir()) == []


def test_only_the_last_used_are_kept(tmp_path):
    entries = [entry(tmp_path, number) for number in range(KEPT)]
    for age, one in enumerate(entries):
        one.save(write)
        os.utime(one.path, (age, age))
    entries[0].find()
    entry(tmp_path, "new").save(write)
    assert len(list((tmp_path / "kind").iterdir())) == KEPT
    assert entries[0].find() is not None
    assert entries[1].find() is None


# What batches cost


def test_a_cost_is_kept(tmp_path):
    save_cost(entry(tmp_path), BatchCost(0.1, 0.2))
    assert read_cost(entry(tmp_path)) == BatchCost(0.1, 0.2)


@pytest.mark.parametrize(
    "kept", ["", "{}", "[1]", '{"batch_seconds": 1, "token_seconds": -1}', '{"token_seconds": 1e999}']
)
def test_an_implausible_cost_counts_as_missing(tmp_path, kept):
    entry(tmp_path).save(lambda folder: (folder / "cost.json").write_text(kept) and None)
    assert read_cost(entry(tmp_path)) is None


def test_an_unwritable_folder_causes_no_failure(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    save_cost(entry(blocked), BatchCost(0.1, 0.2))
    assert read_cost(entry(blocked)) is None


def test_a_cpu_is_identified_by_its_name_and_flags(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name : X\ncpu MHz : 1\nflags : avx512_bf16\nmodel name : X\n")
    assert cpu_model(info) == "flags : avx512_bf16\nmodel name : X"
    assert cpu_model(tmp_path / "missing")


def test_what_was_measured_once_is_not_measured_again(tiny, tmp_path, monkeypatch):
    measured = []
    measure = warm_up.measure
    monkeypatch.setattr(
        warm_up, "measure", lambda *given, **named: measured.append(1) or measure(*given, **named)
    )
    first = load(tiny("static"), cache_folder=str(tmp_path))
    second = load(tiny("static"), cache_folder=str(tmp_path))
    assert len(measured) == 1
    assert first.budget.tokens == second.budget.tokens
    load(tiny("static"), cache_folder=str(tmp_path), batch_size=16)
    assert len(measured) == 2
    monkeypatch.setattr(prepared, "cpu_model", lambda: "another")
    load(tiny("static"), cache_folder=str(tmp_path))
    assert len(measured) == 3
