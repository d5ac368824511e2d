"""Finds the ranges for int8 and uint8 by embedding texts with the configured model."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from embedding_service.engine import EmbedRequest, Int8Ranges
from embedding_service.errors import StartupError
from embedding_service.inference.local import LocalEngine
from embedding_service.quantization import find_ranges
from embedding_service.settings.config import Config

BATCH = 256
BATCH_SECONDS = 600.0

# Ranges from fewer texts would clip most other vectors.
MIN_TEXTS = 100


def read_texts(path: Path) -> list[str]:
    """The non-blank lines of a file. Raises OSError, or StartupError if there are too few."""
    try:
        texts = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise StartupError(f"{path} is not a text file in UTF-8: {error.reason}") from None
    if len(texts) < MIN_TEXTS:
        raise StartupError(f"{path} has {len(texts)} texts; at least {MIN_TEXTS} are needed")
    return texts


def ranges_of(texts: list[str], settings: Config) -> Int8Ranges:
    """The ranges of the texts' normalised vectors. Raises StartupError if the model cannot be loaded."""
    engine = LocalEngine(dataclasses.replace(settings, int8_ranges=None))
    info = engine.wait_loaded()
    vectors = [
        engine.call(
            EmbedRequest(texts=texts[first : first + BATCH], deadline=time.monotonic() + BATCH_SECONDS)
        ).vectors
        for first in range(0, len(texts), BATCH)
    ]
    engine.close()
    return find_ranges(np.concatenate(vectors), info.fingerprint)
