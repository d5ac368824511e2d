"""bfloat16 on CPUs: in OpenVINO if the CPU computes in it, else in torch, and what the log says about it."""

import logging
import threading

import numpy as np
import pytest

from embedding_service.errors import StartupError
from embedding_service.inference import checkpoint, full_start, loading, prepared
from embedding_service.inference.budget import BatchCost
from embedding_service.inference.hardware import computes_bfloat16
from embedding_service.inference.prepared import save_cost
from tests.inference.running import alone, embed, load, request
from tests.inference.test_openvino import SENTENCES, openvino
from tests.inference.test_torch import cosines

has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16, reason="this CPU has neither avx512_bf16 nor AMX")


@needs_bfloat16
def test_bfloat16_in_openvino_is_close_to_float32_on_real_sentences(model_folder, oracle):
    model = load(model_folder, dtype="bfloat16")
    assert (model.info.dtype, model.info.backend) == ("bfloat16", "openvino")
    (answer,) = embed(model, [request(SENTENCES)])
    expected = oracle.encode(SENTENCES, normalize_embeddings=True)
    found = cosines(answer.vectors, expected)
    assert found.mean() > 0.9999
    assert found.min() > 0.999
    assert np.abs(np.linalg.norm(answer.vectors, axis=1) - 1).max() < 1e-6
    assert np.abs(model.exact.forward(alone(model, SENTENCES[0])) - expected[:1]).max() < 1e-5


@pytest.fixture
def without_bfloat16(monkeypatch) -> None:
    for module in (checkpoint, full_start, loading):
        monkeypatch.setattr(module, "computes_bfloat16", lambda _device, _backend: False)


def test_a_cpu_without_bfloat16_runs_it_in_torch_and_says_so(tiny, without_bfloat16, caplog):
    with caplog.at_level(logging.INFO, "embedding_service"):
        model = load(tiny("bert"), dtype="bfloat16")
    assert (model.info.dtype, model.info.backend) == ("bfloat16", "torch")
    assert "float32 is faster" in caplog.text
    with pytest.raises(StartupError, match="avx512_bf16"):
        load(tiny("bert"), dtype="bfloat16", backend="openvino")


@needs_bfloat16
def test_a_model_that_bfloat16_distorts_runs_in_torch(tiny, monkeypatch):
    monkeypatch.setitem(prepared.TOLERANCE, "bfloat16", 0.0)
    model = load(tiny("bert"), dtype="bfloat16")
    assert (model.info.dtype, model.info.backend) == ("bfloat16", "torch")
    with pytest.raises(StartupError, match="differ"):
        load(tiny("bert"), dtype="bfloat16", backend="openvino")


def test_only_openvino_on_a_cpu_computes_in_bfloat16():
    assert not computes_bfloat16("cuda", "auto")
    assert not computes_bfloat16("cpu", "torch")


@needs_bfloat16
@pytest.mark.parametrize(
    ("dtype", "other_seconds", "line"),
    [
        ("auto", 1e-9, "DTYPE=bfloat16 would be about"),
        ("auto", 1.0, "DTYPE=bfloat16 would be no faster"),
        ("bfloat16", 1e-9, "DTYPE=float32 would be about"),
        ("bfloat16", 1.0, None),
    ],
)
def test_the_log_says_which_format_is_faster(tiny, tmp_path, monkeypatch, caplog, dtype, other_seconds, line):
    """The cost of the other format is measured at the first start; here it is kept from an earlier one."""
    own = "float32" if dtype == "auto" else "bfloat16"
    entry_of = full_start._cost_entry

    def known(keys, which, *others):
        entry = entry_of(keys, which, *others)
        if which.dtype != own:
            save_cost(entry, BatchCost(other_seconds, other_seconds))
        return entry

    compared = threading.Event()
    compare = full_start.compare_formats
    monkeypatch.setattr(full_start, "_cost_entry", known)
    monkeypatch.setattr(full_start, "compare_formats", lambda *given: (compare(*given), compared.set()))
    with caplog.at_level(logging.INFO, "embedding_service"):
        load(tiny("bert"), cache_folder=str(tmp_path), dtype=dtype)
        assert compared.wait(60)
    said = [record.message for record in caplog.records if "times as fast" in record.message]
    assert len(said) == (line is not None)
    assert line is None or said[0].startswith(line)
