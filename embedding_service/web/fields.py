"""Decides which unknown fields are ignored, and which are rejected.

Callers send ids, model names and other fields that change nothing here. A field that changes the vectors in
another API is rejected, since ignoring it would return other vectors than the caller expects.
"""

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from embedding_service.errors import InvalidRequest

# Fields that change the vectors in some API or library, with the values that ask for what we do anyway.
VECTOR_FIELDS: dict[str, tuple[Any, ...]] = {
    "autoTruncate": (True,),
    "dimension": (),
    "dimensions": (),
    "embedding_dimension": (),
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
    "encoding_format": ("float",),
    "input_type": (),
    "instruct": ("",),
    "instruction": ("",),
    "late_chunking": (False,),
    "matryoshka_dim": (),
    "normalize": (True,),
    "normalize_embeddings": (True,),
    "normalized": (True,),
    "output_dimension": (),
    "output_dimensionality": (),
    "output_dimensions": (),
    "output_dtype": ("float", "float32"),
    "outputDimensionality": (),
    "overflow": ("truncate",),
    "pooling": (),
    "pooling_mode": (),
    "pooling_strategy": (),
    "pooling_type": (),
    "precision": ("float32",),
    "prompt": ("",),
    "prompt_name": (),
    "quantization": ("none", "float32"),
    "return_multivector": (False,),
    "task": (),
    "task_type": (),
    "truncate": (True,),
    "truncate_dim": (),
    "truncate_prompt_tokens": (),
    "truncation": (True,),
    "truncation_direction": (),
    "truncation_side": (),
}

# Those that ask for vectors of length 1.
NORMALIZE_FIELDS = ("normalize", "normalize_embeddings", "normalized")

# Other names that callers use for the texts.
TEXT_FIELDS = (
    "input",
    "prompt",
    "sentence",
    "sentences",
    "content",
    "document",
    "documents",
    "data",
    "query",
)

# Names at least this similar (0 to 1) count as misspellings: `normalise` and `normalize` score 0.89.
MIN_SIMILARITY = 0.8


def check_others(
    known: Iterable[str],
    sent: Mapping[str, Any],
    parent: str = "",
    *,
    near: bool = False,
    normalizes: bool = True,
) -> None:
    """Raises InvalidRequest for a field that must not be ignored; with `near`, also for a misspelt one.

    `normalizes` says whether the route's vectors have length 1.
    """
    names = tuple(known)
    for name, value in sent.items():
        if value is None or name in names:
            continue
        path = f"{parent}{name[:50]}"
        if near:
            meant = _nearest(name[:50], names)
            if meant is None and name in TEXT_FIELDS and "texts" not in sent:
                meant = "texts"
            if meant is not None:
                raise InvalidRequest(f"is not a field here; use {meant}", field=path)
        accepted = (normalizes,) if name in NORMALIZE_FIELDS else VECTOR_FIELDS.get(name)
        if accepted is not None and value not in accepted:
            raise InvalidRequest("is not supported here, and would change the vectors", field=path)


# Cached, since a client that sends an unknown field sends it with every request.
@functools.lru_cache(maxsize=1024)
def _nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that this one probably misspells."""
    by_spelling = {_spelling(each): each for each in known}
    alike = difflib.get_close_matches(_spelling(name), by_spelling, 1, MIN_SIMILARITY)
    return by_spelling[alike[0]] if alike else None


def _spelling(name: str) -> str:
    """The name in a form that is the same for snake_case, kebab-case and camelCase."""
    return name.lower().replace("_", "").replace("-", "")
