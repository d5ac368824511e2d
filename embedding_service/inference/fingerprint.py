"""The fingerprint: equal for services whose vectors are interchangeable."""

import hashlib
import json
from collections.abc import Mapping


def fingerprint(
    *, weights: str, dtype: str, pooling: str, prompts: Mapping[str, str], max_seq_length: int
) -> str:
    """A short hash of all that changes a vector; `weights` is the hash of the weights."""
    facts = [weights, dtype, pooling, dict(prompts), max_seq_length]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
