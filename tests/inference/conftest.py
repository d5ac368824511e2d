"""Tiny models, each built once, and batchers that are closed after their test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedding_service.inference.batcher import Batcher
from tests.inference import tiny_models
from tests.inference.fake_runtime import FakeRuntime


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("mpnet")` returns the folder of a model of that kind."""
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = tiny_models.build(kind, tmp_path_factory.mktemp(kind))
        return built[kind]

    return folder


@pytest.fixture
def build() -> Iterator[Callable[..., Batcher]]:
    """`build(runtime)` makes a batcher that is closed after the test."""
    batchers: list[Batcher] = []

    def make(runtime: FakeRuntime, max_queued_tokens: int = 1_000_000, **arguments: Any) -> Batcher:
        batchers.append(Batcher(runtime, max_queued_tokens=max_queued_tokens, **arguments))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close("the test is over")
