"""The converted model: cached on disk, checked against torch, and rejected if it disagrees."""

import logging
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from embedding_service.errors import StartupError
from embedding_service.inference.model import Model
from embedding_service.inference.tokenized import Rows
from tests.inference import running
from tests.inference.running import alone

# Not on ARM, and not on a GPU machine whose bundle leaves it out.
openvino = pytest.importorskip("openvino")
conversion = pytest.importorskip("embedding_service.inference.backends.conversion")

pytestmark = pytest.mark.slow

SENTENCES = Path(__file__).parents[2].joinpath("benchmarks", "sentences.txt").read_text().splitlines()


def load(folder, cache, **settings) -> Model:
    return running.load(folder, cache_folder=str(cache), **settings)


def vectors(model: Model) -> np.ndarray:
    texts = ["the quick brown fox", "", "of the river " * 30]
    return np.concatenate([model.streams[0].forward([alone(model, text)]) for text in texts])


@pytest.fixture
def conversions(monkeypatch) -> list[str]:
    """A list that grows by one item with each conversion."""
    made: list[str] = []
    convert = conversion.convert

    def count(*arguments, **named):
        made.append("conversion")
        return convert(*arguments, **named)

    monkeypatch.setattr(conversion, "convert", count)
    return made


def test_the_second_start_converts_nothing_and_gives_the_same_vectors(tiny, tmp_path, conversions):
    first = vectors(load(tiny("bert"), tmp_path))
    second = vectors(load(tiny("bert"), tmp_path))
    assert conversions == ["conversion"]
    assert np.abs(first - second).max() < 1e-6


def test_other_weights_have_another_entry(tiny, tmp_path, conversions):
    load(tiny("bert"), tmp_path)
    load(tiny("dense"), tmp_path)
    assert len(conversions) == 2


def test_an_unwritable_cache_causes_one_warning(tiny, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert load(tiny("bert"), blocked / "below").info.backend == "openvino"
    (line,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert "CACHE_FOLDER cannot be written" in line.message


def test_a_conversion_with_other_vectors_is_not_used(tiny, tmp_path, monkeypatch, caplog):
    convert = conversion.convert

    def wrong(model, example, *, int8):
        with torch.no_grad():
            for weights in model[0].model.parameters():
                weights.mul_(1.1)
        graph = convert(model, example, int8=int8)
        with torch.no_grad():
            for weights in model[0].model.parameters():
                weights.div_(1.1)
        return graph

    monkeypatch.setattr(conversion, "convert", wrong)
    model = load(tiny("mpnet"), tmp_path)
    assert model.info.backend == "torch"
    (line,) = [record.message for record in caplog.records if "using torch" in record.message]
    assert "differ" in line
    monkeypatch.setattr(conversion, "convert", None)  # the refusal is remembered
    with pytest.raises(StartupError, match="differ"):
        load(tiny("mpnet"), tmp_path, backend="openvino")


# int8


def test_int8_without_nncf_gets_one_line_with_a_remedy(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(StartupError, match=r"pip install nncf"):
        load(tiny("bert"), tmp_path, dtype="int8")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("bert", {"backend": "torch"}, id="torch"),
        pytest.param("static", {}, id="no transformer"),
    ],
)
def test_int8_that_is_not_supported_fails_the_start(tiny, tmp_path, kind, settings):
    with pytest.raises(StartupError, match="DTYPE=int8 needs"):
        load(tiny(kind), tmp_path, dtype="int8", **settings)


def test_int8_is_close_to_float32_on_real_sentences(model_folder, oracle, tmp_path):
    model = load(model_folder, tmp_path, dtype="int8")
    assert (model.info.dtype, model.info.backend) == ("int8", "openvino")
    batches = [SENTENCES[first : first + 32] for first in range(0, len(SENTENCES), 32)]
    got = np.concatenate(
        [model.streams[0].forward([Rows.all_of(model.preprocessor.prepare(batch))]) for batch in batches]
    )
    expected = oracle.encode(SENTENCES, normalize_embeddings=True)
    cosines = (got * expected).sum(axis=1)
    assert cosines.mean() > 0.998
    assert cosines.min() > 0.99
    assert np.abs(model.exact.forward(alone(model, SENTENCES[0])) - expected[:1]).max() < 1e-5
    assert load(model_folder, tmp_path).info.fingerprint != model.info.fingerprint


# All cores for a batch alone


@pytest.mark.parametrize("fails", [False, True], ids=["compiled", "cannot be compiled"])
def test_a_batch_alone_gets_all_cores_once_that_has_paid(tiny, tmp_path, monkeypatch, caplog, fails):
    from embedding_service.inference.backends import openvino as backends

    load(tiny("bert"), tmp_path)
    (graph,) = tmp_path.glob("graphs/*")
    compile_graph, streams = backends._compile, []

    def compile_quickly(graph, count, *arguments):
        streams.append(count)
        if fails and count == 1:
            raise RuntimeError("no memory")
        return compile_graph(graph, count, *arguments)[0], 1e-9

    monkeypatch.setattr(backends, "_compile", compile_quickly)
    whole = backends.openvino_backend(backends.read_graph(graph), dtype="float32", threads=2).all_cores
    assert streams == [2]
    features = {name: np.ones((1, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    first = whole.run(features)
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join()
    assert streams == [2, 1]
    assert np.abs(whole.run(features) - first).max() < 1e-6
    assert streams == [2, 1]
    assert ("run on one core: the model could not be compiled" in caplog.text) == fails


def test_the_copy_for_batches_alone_is_given_back_if_none_comes(tiny, tmp_path, monkeypatch):
    from embedding_service.inference.backends import openvino as backends

    load(tiny("bert"), tmp_path)
    (graph,) = tmp_path.glob("graphs/*")
    compile_graph, made = backends._compile, []

    def compile_quickly(*arguments):
        compiled, _ = compile_graph(*arguments)
        made.append(weakref.ref(compiled))
        return compiled, 1e-9

    monkeypatch.setattr(backends, "_compile", compile_quickly)
    backend = backends.openvino_backend(backends.read_graph(graph), dtype="float32", threads=2)
    features = {name: np.ones((1, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for copies in (2, 3):
        first = backend.all_cores.run(features)
        for thread in threading.enumerate():
            if thread.name == "compile":
                thread.join()
        assert len(made) == copies
        backend.rest()
        assert made[-1]() is not None
        monkeypatch.setattr(backends, "ALONE_SECONDS", 0)
        backend.rest()
        assert made[-1]() is None
        monkeypatch.setattr(backends, "ALONE_SECONDS", 60)
        assert np.abs(backend.sessions[0].run(features) - first).max() < 1e-6
    assert made[0]() is not None


def test_scratch_memory_is_given_back_once_nothing_runs(tiny, tmp_path, monkeypatch):
    from embedding_service.inference.backends import openvino as backends

    given_back: list[str] = []
    monkeypatch.setattr(backends, "release", lambda: given_back.append("memory"))
    load(tiny("bert"), tmp_path)
    model = load(tiny("bert"), tmp_path)
    before = vectors(model)
    model.rest()
    assert not given_back
    monkeypatch.setattr(backends, "IDLE_SECONDS", 0)
    model.rest()
    model.rest()
    assert given_back == ["memory"]
    assert np.array_equal(vectors(model), before)
    model.rest()
    assert len(given_back) == 2
