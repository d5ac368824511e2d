"""Decides which unknown fields are ignored, and which are rejected.

Callers send ids, model names and other fields that change nothing here. A field that changes the vectors in
another API is rejected, since ignoring it would return other vectors than the caller expects.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from embedding_service.errors import InvalidRequest
from embedding_service.words import nearest

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
            meant = nearest(name[:50], names)
            if meant is None and name in TEXT_FIELDS and "texts" not in sent:
                meant = "texts"
            if meant is not None:
                raise InvalidRequest(f"is not a field here; use {meant}", field=path)
        accepted = (normalizes,) if name in NORMALIZE_FIELDS else VECTOR_FIELDS.get(name)
        if accepted is not None and value not in accepted:
            raise InvalidRequest("is not supported here, and would change the vectors", field=path)
