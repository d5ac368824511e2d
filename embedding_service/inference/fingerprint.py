"""The fingerprint: equal for services whose vectors are interchangeable."""

import hashlib
import json
from collections.abc import Mapping

from embedding_service.engine import Int8Ranges


def fingerprint(
    *,
    weights: str,
    dtype: str,
    pooling: str,
    prompts: Mapping[str, str],
    max_seq_length: int,
    default_prompt: str | None,
) -> str:
    """A short hash of everything that affects a vector; `weights` is the hash of the weights."""
    facts: list[object] = [weights, dtype, pooling, dict(prompts), max_seq_length]
    if default_prompt is not None:
        facts.append(default_prompt)
    return _hash(facts)


def with_ranges(fingerprint: str, ranges: Int8Ranges) -> str:
    """The fingerprint of a service that also answers in int8, with these ranges."""
    return _hash([fingerprint, ranges.minimum, ranges.maximum])


def _hash(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
