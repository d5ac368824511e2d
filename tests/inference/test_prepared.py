"""A prepared model starts without torch, gives the same vectors, and is prepared again if damaged."""

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embedding_service.errors import ModelFailure, StartupError
from embedding_service.inference import full_start, prepared
from embedding_service.inference.model import Model
from tests.inference import running
from tests.inference.running import alone, embed, request, texts

pytest.importorskip("openvino")

pytestmark = pytest.mark.slow

# Kinds that OpenVINO can run.
KINDS = ["bert", "mpnet", "roberta-cls", "dense", "max-and-weighted", "prompts", "prompt-not-pooled", "nomic"]


def load(folder: Path, cache: Path, **settings) -> Model:
    return running.load(folder, cache_folder=str(cache), **settings)


@pytest.fixture
def full_starts(monkeypatch) -> list[str]:
    """A list that grows by one item with each full start."""
    made: list[str] = []
    load_fully = full_start.load_fully
    monkeypatch.setattr(full_start, "load_fully", lambda *given: made.append("full") or load_fully(*given))
    return made


@pytest.fixture(scope="module")
def prepared_once(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    load(tiny("bert"), cache)
    return cache


@pytest.fixture
def cache(prepared_once: Path, tmp_path: Path) -> Path:
    """A cache of the test's own, in which "bert" is prepared."""
    return shutil.copytree(prepared_once, tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_model_gives_the_vectors_of_encode(tiny, tmp_path, kind, full_starts):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    if kind == "roberta-cls":
        oracle.max_seq_length = 38  # by itself it fails at a text longer than its positions
    first, second = load(tiny(kind), tmp_path), load(tiny(kind), tmp_path)
    assert full_starts == ["full"]
    assert first.info == second.info
    source = random.Random(kind)
    names = [None, *(name for name, prompt in oracle.prompts.items() if prompt)]
    requests = [
        request(texts(source, count), prompt_name=source.choice(names)) for count in (1, 2, 30, 5, 12)
    ]
    for one, answer in zip(requests, embed(second, requests), strict=True):
        expected = oracle.encode(
            one.texts, prompt_name=one.prompt_name, normalize_embeddings=True, batch_size=7
        )
        assert np.abs(answer.vectors - expected).max() < 1e-5


LOADING = """
import sys
from embedding_service.inference.loading import load
from embedding_service.settings.config import Config

folder, cache = sys.argv[1:3]
settings = Config(embedding_model=folder, device="cpu", model_processes=64, cache_folder=cache)
"""


def in_new_process(code: str, *arguments: object) -> str:
    """What a new interpreter prints that imports nothing but the service's own half of the model."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING + code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prepared_start_imports_no_torch_until_it_is_needed(tiny, cache):
    printed = in_new_process(
        "model = load(settings)\n"
        "print({'torch', 'transformers', 'sentence_transformers', 'scipy', 'sklearn'} & sys.modules.keys())\n"
        "print(len(model.exact.embed_tokens(['fox'], None)[0]), 'torch' in sys.modules)\n",
        tiny("bert"),
        cache,
    )
    assert printed.splitlines() == ["set()", "3 True"]


def test_without_torch_a_prepared_model_serves_and_the_rest_is_refused_in_a_line(tiny, cache):
    printed = in_new_process(
        # As in an environment without these packages.
        "import importlib.metadata, importlib.util\n"
        "gone = ('torch', 'transformers', 'sentence_transformers', 'sentence-transformers')\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "find, version = importlib.util.find_spec, importlib.metadata.version\n"
        "importlib.util.find_spec = lambda name: None if name in gone else find(name)\n"
        "def known(name):\n"
        "    if name in gone: raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "importlib.metadata.version = known\n"
        "model = load(settings)\n"
        "print(model.info.backend)\n"
        "try: model.exact.embed_tokens(['fox'], None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "import dataclasses\n"
        "try: load(dataclasses.replace(settings, max_seq_length=7))\n"
        "except Exception as error: print(type(error).__name__, error)\n",
        tiny("bert"),
        cache,
    )
    backend, tokens, other = printed.splitlines()
    assert backend == "openvino"
    assert tokens.startswith("ModelFailure needs the model in torch")
    assert other.startswith("StartupError EMBEDDING_MODEL has not been prepared")


# Damage: one file at a time


def file(cache: Path, name: str) -> Path:
    (found,) = cache.rglob(name)
    return found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# Every kind of damage, and every file.
DAMAGES = [(damage, "model.bin") for damage in (truncate, flip, empty, zero, become_a_folder, Path.unlink)]
DAMAGES += [(flip, name) for name in ("model.xml", "facts.json", "references.npz")]


@pytest.mark.parametrize(("damage", "name"), DAMAGES, ids=lambda one: getattr(one, "__name__", one))
def test_a_damaged_entry_leads_to_a_full_start_and_right_vectors(tiny, cache, full_starts, damage, name):
    damage(file(cache, name))
    check(tiny("bert"), cache)
    assert full_starts == ["full"]
    load(tiny("bert"), cache)
    assert full_starts == ["full"]


def check(folder: Path, cache: Path) -> None:
    """Load a model, whose vectors must be right."""
    some = texts(random.Random(1), 9)
    expected = SentenceTransformer(str(folder), device="cpu").encode(some, normalize_embeddings=True)
    (answer,) = embed(load(folder, cache), [request(some)])
    assert np.abs(answer.vectors - expected).max() < 1e-5


def resealed(cache: Path, kind: str) -> None:
    """Make the hashes of the only entry of a kind fit its files, as if it had been written so."""
    (folder,) = (cache / kind).iterdir()
    entry = prepared.Entry(str(cache), kind, [])
    entry.path = folder
    (folder / "sums.json").write_text(entry._sums(folder))


def wrong_weights(cache: Path, _tiny) -> None:
    weights = file(cache, "model.bin")
    weights.write_bytes(bytes(255 - byte for byte in weights.read_bytes()))
    resealed(cache, "graphs")


def foreign_graph(cache: Path, tiny) -> None:
    load(tiny("dense"), cache / "other")
    own, other = cache / "graphs", cache / "other"
    for name in ("model.xml", "model.bin"):
        shutil.copyfile(file(other, name), file(own, name))
    shutil.rmtree(other)
    resealed(cache, "graphs")


def other_facts(**changes):
    def change(cache: Path, _tiny) -> None:
        facts = json.loads(file(cache, "facts.json").read_bytes())
        facts["tokenizer"] |= changes
        file(cache, "facts.json").write_text(json.dumps(facts))
        resealed(cache, "models")

    return change


def no_facts(cache: Path, _tiny) -> None:
    file(cache, "facts.json").write_text("{}")
    resealed(cache, "models")


def no_references(cache: Path, _tiny) -> None:
    np.savez(file(cache, "references.npz"))
    resealed(cache, "models")


UNSOUND = {
    "wrong weights": wrong_weights,
    "the graph of another model": foreign_graph,
    "cut at the other side": other_facts(truncation_side="left"),
    "other padding": other_facts(pad_id=7),
    "cut too early": other_facts(max_length=9),
    "no tokenizer": other_facts(serialized="{}"),
    "facts of another form": no_facts,
    "no references": no_references,
}


@pytest.mark.parametrize("change", UNSOUND)
def test_an_entry_that_is_whole_and_wrong_is_not_used(tiny, cache, full_starts, caplog, change):
    UNSOUND[change](cache, tiny)
    full_starts.clear()
    with caplog.at_level(logging.WARNING, "embedding_service"):
        check(tiny("bert"), cache)
    assert full_starts == ["full"]
    assert len([record for record in caplog.records if record.name.startswith("embedding_service")]) <= 1


def test_files_that_changed_have_another_entry(tiny, tmp_path, full_starts):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    load(folder, tmp_path / "cache")
    config = folder / "1_Pooling" / "config.json"
    config.write_text(config.read_text().replace('"mean"', '"cls"'))
    check(folder, tmp_path / "cache")
    assert full_starts == ["full", "full"]


@pytest.mark.parametrize(
    "package", ["openvino", "tokenizers", "torch", "transformers", "sentence-transformers"]
)
def test_other_versions_have_another_entry(tiny, cache, full_starts, monkeypatch, package):
    version = prepared._version
    monkeypatch.setattr(prepared, "_version", lambda name: "0" if name == package else version(name))
    check(tiny("bert"), cache)
    assert full_starts == ["full"]


@pytest.mark.parametrize(
    "settings",
    [{"max_seq_length": 12}, {"prompts": {"query": "q: "}}, {"dtype": "float32"}, {"batch_size": 8}],
    ids=str,
)
def test_other_settings_have_another_entry(tiny, cache, full_starts, settings):
    load(tiny("bert"), cache, **settings)
    load(tiny("bert"), cache, **settings)
    assert full_starts == ["full"]


# What needs torch


def test_exact_vectors_of_a_prepared_model(tiny, tmp_path):
    load(tiny("prompt-not-pooled"), tmp_path)
    model = load(tiny("prompt-not-pooled"), tmp_path)
    oracle = SentenceTransformer(str(tiny("prompt-not-pooled")), device="cpu")
    got = model.exact.forward(alone(model, "the quick fox", "query: "))
    assert np.abs(got - oracle.encode(["the quick fox"], prompt="query: ")).max() < 1e-5


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_torch_is_not_loaded_from_files_that_have_gone_or_changed(tiny, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    load(folder, tmp_path / "cache")
    model = load(folder, tmp_path / "cache")
    if change == "gone":
        shutil.rmtree(folder)
    else:
        flip(folder / "model.safetensors")
    for _ in range(2):
        with pytest.raises((ModelFailure, StartupError)):
            model.exact.embed_tokens(["fox"], None)
    assert len(model.streams[0].forward([alone(model, "fox")])) == 1


def test_a_refusal_is_remembered(tiny, tmp_path, monkeypatch, caplog):
    assert load(tiny("left-padding"), tmp_path).info.backend == "torch"
    monkeypatch.setattr("embedding_service.inference.backends.conversion.convert", None)
    assert load(tiny("left-padding"), tmp_path).info.backend == "torch"
    assert caplog.text.count("OpenVINO cannot run this model, using torch: its vectors differ") == 2


def test_ranges_belong_to_the_fingerprint_of_a_prepared_model_too(tiny, tmp_path):
    plain = load(tiny("bert"), tmp_path)
    ranges = tmp_path / "ranges.json"
    numbers = [0.0] * plain.info.embedding_dimension
    ranges.write_text(
        json.dumps({"fingerprint": plain.info.fingerprint, "minimum": numbers, "maximum": numbers})
    )
    second = load(tiny("bert"), tmp_path, int8_ranges=str(ranges))
    assert second.info.int8_ranges is not None
    assert second.info.fingerprint not in (plain.info.fingerprint, "")
