"""A run that must not start says why in one line and leaves every file alone."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from embedding_service import embed_file
from embedding_service.bulk import paths
from embedding_service.bulk.part import PartFile, Place
from embedding_service.bulk.paths import Paths
from embedding_service.engine import Embeddings, EmbedRequest
from embedding_service.errors import StartupError
from tests.bulk.running import JOB, Numbers, main
from tests.fakes import Served


def test_a_run_in_the_background_says_so_in_every_request(tmp_path, monkeypatch):
    corpus, priorities = tmp_path / "corpus.txt", set()

    class Listening(Numbers):
        def embed(self, request: EmbedRequest) -> Embeddings:
            priorities.add(request.priority)
            return super().embed(request)

    corpus.write_text("1\n2\n")
    served = Served(Listening())
    try:
        arguments = (corpus, "-o", tmp_path / "v.npy", "--url", served.url, "--priority", "background")
        assert main(monkeypatch, *arguments) == 0
    finally:
        served.stop()
    assert priorities == {"background"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl", "-o", "v.npy"], "is not a file"),
        (["corpus.jsonl", "-o", "v.xlsx"], "must end in .npy, .jsonl, .parquet"),
        (["corpus.jsonl", "-o", "nowhere/v.npy"], "is not a folder"),
        (["corpus.jsonl", "-o", "there.npy"], "--restart replaces it"),
        (["corpus.jsonl", "-o", "folder.npy"], "exists and is not a regular file"),
        (["corpus.jsonl", "-o", "v.npy.errors.jsonl"], "for lists of bad rows"),
        (["corpus.jsonl", "-o", "v.npy.chunks.jsonl"], "for the places of chunks"),
        (["corpus.jsonl", "-o", "v" * 250 + ".npy"], "name too long"),
        (["corpus.pdf", "-o", "v.npy"], "must end in .jsonl"),
        (["corpus.jsonl", "-o", "v.npy", "--chunk-overlap", "9"], "--chunk-overlap needs --overflow mean"),
        (["table.csv", "-o", "v.npy"], "there is no column 'text'; the columns are a, b"),
        (["corpus.jsonl", "-o", "v.npy", "--url", "localhost:1"], "http://localhost:1/ does not answer"),
        (["corpus.jsonl", "-o", "v.npy", "--url", "http://127.0.0.1:1"], "does not answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_command_that_cannot_start_says_why_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    for name in ("corpus.jsonl", "corpus.pdf", "there.npy"):
        (tmp_path / name).write_text('"text"\n')
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "folder.npy").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embed_file", *arguments])
    assert embed_file.main() == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its inode and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.lstat().st_ino, path.read_bytes()) for path in files}


OURS = ["", ".part", ".part.json", ".errors.jsonl", ".chunks.jsonl", ".part.new", ".part.json.part.new"]


@pytest.mark.parametrize("restart", [[], ["--restart"]], ids=["", "restart"])
@pytest.mark.parametrize("link", ["path", "symlink", "hard link", "symlinked folder"])
@pytest.mark.parametrize("suffix", OURS, ids=lambda suffix: suffix or "output")
def test_a_run_never_overwrites_its_input(tmp_path, monkeypatch, capsys, suffix, link, restart):
    output = tmp_path / "v.jsonl"
    ours = output.with_name(output.name + suffix)
    corpus = tmp_path / "corpus.jsonl"
    if link == "path":
        corpus = ours
    corpus.write_text('{"text": "keep me"}\n')
    if link == "symlink":
        ours.symlink_to(corpus)
    elif link == "hard link":
        ours.hardlink_to(corpus)
    elif link == "symlinked folder":
        corpus.rename(ours)
        (tmp_path / "alias").symlink_to(tmp_path)
        corpus = tmp_path / "alias" / ours.name
    before = snapshot(tmp_path)
    assert main(monkeypatch, corpus, "-o", output, *restart) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert snapshot(tmp_path) == before


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("restart", [[], ["--restart"]], ids=["", "restart"])
@pytest.mark.parametrize("make", [a_folder, a_pipe])
@pytest.mark.parametrize("suffix", OURS, ids=lambda suffix: suffix or "output")
def test_a_folder_or_pipe_in_place_of_an_output_file_is_left_alone(
    tmp_path, monkeypatch, capsys, suffix, make, restart
):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "v.npy"
    corpus.write_text('"text"\n')
    make(output.with_name(output.name + suffix))
    assert main(monkeypatch, corpus, "-o", output, *restart) == 2
    said = capsys.readouterr().err
    assert "exists and is not a regular file" in said and said.count("\n") == 1


@pytest.mark.parametrize("suffix", OURS[1:4])
def test_a_file_that_is_not_ours_is_not_replaced_without_restart(tmp_path, suffix):
    output = tmp_path / "v.npy"
    foreign = output.with_name(output.name + suffix)
    foreign.write_text("someone's")
    before = snapshot(tmp_path)
    with pytest.raises(StartupError, match="--restart replaces it"):
        paths.require_room(Path(__file__).stat(), output, restart=False)
        PartFile(output, JOB)
    assert snapshot(tmp_path) == before
    paths.require_room(Path(__file__).stat(), output, restart=True)
    PartFile(output, JOB, restart=True).close()
    assert "someone's" not in {path.read_bytes().decode(errors="replace") for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_run_does_not_start_if_two_of_its_files_are_the_same(tmp_path, monkeypatch, capsys, kind):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "v.npy"
    corpus.write_text('"text"\n')
    Paths(output).errors.write_text("")
    if kind == "symlink":
        Paths(output).part.symlink_to(Paths(output).errors)
    else:
        Paths(output).part.hardlink_to(Paths(output).errors)
    assert main(monkeypatch, corpus, "-o", output) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_restart_spares_hard_links_to_its_part_and_a_run_in_progress(tmp_path):
    output, kept = tmp_path / "v.npy", tmp_path / "kept"
    kept.write_bytes(b"x" * 1000)
    Paths(output).part.hardlink_to(kept)
    first = PartFile(output, JOB, restart=True)
    assert kept.read_bytes() == b"x" * 1000
    first.append(np.ones((1, 2), np.float32), [], [Place(0)])
    with pytest.raises(StartupError, match="another run is writing"):
        PartFile(output, JOB, restart=True)
    first.append(np.zeros((1, 2), np.float32), [], [Place(1)])
    first.seal()
    assert np.load(first.paths.part).tolist() == [[1, 1], [0, 0]]


def test_an_unwritable_folder_stops_the_run_at_the_start(tmp_path, monkeypatch, capsys):
    """Root can write anywhere but in /proc, and finds that out later than other users."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('"text"\n')
    served = Served(Numbers())
    try:
        assert main(monkeypatch, corpus, "-o", "/proc/v.npy", "--url", served.url) == 2
    finally:
        served.stop()
    said = capsys.readouterr().err
    assert "/proc" in said and said.count("\n") == 1


def test_restart_keeps_the_old_files_until_the_run_can_start(tmp_path, monkeypatch):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "v.npy"
    corpus.write_text('"text"\n')
    part = PartFile(output, JOB)
    part.append(np.ones((1, 2), np.float32), [], [Place(0)])
    part.close()
    before = snapshot(tmp_path)
    assert main(monkeypatch, corpus, "-o", output, "--restart", "--url", "http://127.0.0.1:1") == 2
    assert snapshot(tmp_path) == before


def test_a_run_from_a_pipe_cannot_resume_and_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    output, pipe = tmp_path / "v.npy", tmp_path / "pipe"
    os.mkfifo(pipe)
    PartFile(output, JOB).close()
    before = snapshot(tmp_path)
    for name in (pipe, "-"):
        assert main(monkeypatch, name, "-o", output) == 2
        said = capsys.readouterr().err
        assert "--restart starts over" in said and said.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"field": "body"}, "--field 'text', now 'body'"),
        ({"dimensions": 64}, "--dimensions none, now 64"),
        ({"input_type": "query"}, "--input-type none, now 'query'"),
        ({"prompt": "a: "}, "--prompt none, now 'a: '"),
        (
            {"overflow": "chunks", "chunk_overlap": 9},
            "--overflow none, now 'chunks'; --chunk-overlap none, now 9",
        ),
        ({"format": "csv", "delimiter": ";"}, "--format 'jsonl', now 'csv'; --delimiter '', now ';'"),
        ({"model": "other", "fingerprint": "g"}, "the model 'm', now 'other'"),
        ({"fingerprint": "g"}, "a model with the fingerprint 'f', now 'g'"),
        ({"input_hash": "i"}, "an input with the hash 'h', now 'i'"),
    ],
    ids=str,
)
def test_another_job_is_refused_with_the_old_and_the_new_value(tmp_path, change, words):
    output = tmp_path / "v.npy"
    PartFile(output, JOB).close()
    with pytest.raises(StartupError, match=re.escape(words)):
        PartFile(output, JOB | change)


def test_an_input_that_changes_during_the_run_gives_no_output(tmp_path, monkeypatch, capsys):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "vectors.npy"
    corpus.write_text("1\n2\n3\n")

    class Meddling(Numbers):
        def embed(self, request: EmbedRequest) -> Embeddings:
            if request.texts == ["1", "2", "3"]:
                corpus.write_text("1\n5\n3\n")
            return super().embed(request)

    served = Served(Meddling())
    try:
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url) == 1
        assert "changed while it was being read" in capsys.readouterr().err and not output.exists()
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url) == 2
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--restart") == 0
    finally:
        served.stop()
