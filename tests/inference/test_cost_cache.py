"""The cost of batches is kept for the next start, for the same machine and model only."""

import pytest

from embedding_service.inference import cost_cache, warm_up
from embedding_service.inference.budget import BatchCost
from embedding_service.inference.cost_cache import CostCache, cpu_model
from tests.inference.running import load


def test_a_cost_is_found_only_for_the_same_model_and_machine(tmp_path):
    CostCache(str(tmp_path), ["model", 2]).save(BatchCost(0.1, 0.2))
    assert CostCache(str(tmp_path), ["model", 2]).load() == BatchCost(0.1, 0.2)
    assert CostCache(str(tmp_path), ["model", 3]).load() is None


def test_another_cpu_has_another_entry(tmp_path, monkeypatch):
    CostCache(str(tmp_path), []).save(BatchCost(0.1, 0.2))
    monkeypatch.setattr(cost_cache, "cpu_model", lambda: "another")
    assert CostCache(str(tmp_path), []).load() is None


@pytest.mark.parametrize(
    "kept",
    [
        "",
        "{}",
        "[1]",
        '{"batch_seconds": 1, "token_seconds": -1}',
        '{"batch_seconds": NaN, "token_seconds": 1}',
    ],
)
def test_a_damaged_entry_counts_as_missing(tmp_path, kept):
    cache = CostCache(str(tmp_path), [])
    cache.save(BatchCost(0.1, 0.2))
    (file,) = tmp_path.rglob("*.json")
    file.write_text(kept)
    assert cache.load() is None


def test_an_unwritable_folder_causes_no_failure(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    CostCache(str(blocked), []).save(BatchCost(0.1, 0.2))
    assert CostCache(str(blocked), []).load() is None


def test_a_cpu_is_identified_by_its_name_and_flags(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name : X\ncpu MHz : 1\nflags : avx512_bf16\nmodel name : X\n")
    assert cpu_model(info) == "flags : avx512_bf16\nmodel name : X"
    assert cpu_model(tmp_path / "missing")


@pytest.mark.slow
def test_the_second_start_measures_nothing(tiny, tmp_path, monkeypatch):
    measured = []
    measure = warm_up.measure
    monkeypatch.setattr(
        warm_up, "measure", lambda *given, **named: measured.append(1) or measure(*given, **named)
    )
    first = load(tiny("bert"), cache_folder=str(tmp_path), dtype="float32")
    second = load(tiny("bert"), cache_folder=str(tmp_path), dtype="float32")
    assert len(measured) == 1
    assert first.budget.tokens == second.budget.tokens
    load(tiny("bert"), cache_folder=str(tmp_path), dtype="float32", batch_size=16)
    assert len(measured) == 2
