"""The fingerprint: equal for services whose vectors are interchangeable."""

import hashlib
import json
from collections.abc import Mapping

from embedding_service.engine import Int8Ranges


def fingerprint(
    *, weights: str, dtype: str, pooling: str, prompts: Mapping[str, str], max_seq_length: int
) -> str:
    """A short hash of everything that affects a vector; `weights` is the hash of the weights."""
    return _hash([weights, dtype, pooling, dict(prompts), max_seq_length])


def with_ranges(fingerprint: str, ranges: Int8Ranges) -> str:
    """The fingerprint of a service that also answers in int8, with these ranges."""
    return _hash([fingerprint, ranges.minimum, ranges.maximum])


def _hash(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
