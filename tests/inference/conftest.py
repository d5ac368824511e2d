"""Tiny models, built once each, and the batcher's answer for texts in any mixture."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.inference import tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("mpnet")` is the folder of that kind of model."""
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = tiny_models.build(kind, tmp_path_factory.mktemp(kind))
        return built[kind]

    return folder
