"""Decides which unknown fields are ignored, and which are rejected.

Callers send ids, model names and other fields that change nothing here. A field that changes the vectors in
another API is rejected, since ignoring it would return other vectors than the caller expects.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from embedding_service.errors import InvalidRequest
from embedding_service.web.context import current
from embedding_service.words import nearest

# What changes the vectors in some API: by meaning, the names of fields, and the values that ask for
# what we do anyway. Meanings have the names of EmbedRequest's fields, if there is one.
MEANINGS: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "dimensions": (
        (
            *("dimensions", "dimension", "embedding_dimension", "output_dimension", "output_dimensions"),
            *("output_dimensionality", "outputDimensionality", "matryoshka_dim", "truncate_dim"),
        ),
        (),
    ),
    "normalize": (("normalize", "normalized", "normalize_embeddings"), ()),
    "prompt_name": (("prompt_name",), ()),
    "input_type": (("task_type", "input_type", "task", "embedding_task"), ()),
    "prompt": (
        (
            *("prompt", "prefix", "instruction", "instruct", "prompt_prefix", "text_prefix"),
            *("query_prefix", "query_instruction", "document_prefix", "passage_prefix", "embed_instruction"),
        ),
        ("",),
    ),
    "truncate": (("truncate", "truncation", "autoTruncate", "truncate_prompt_tokens"), (True, -1, "END")),
    "truncation_side": (("truncation_direction", "truncation_side"), ()),
    "overflow": (("overflow",), ("truncate",)),
    "precision": (
        (
            *("precision", "output_dtype", "embedding_type", "embedding_types", "encoding_format"),
            "quantization",
        ),
        ("float", "float32", ["float"], "none"),
    ),
    "pooling": (("pooling", "pooling_mode", "pooling_strategy", "pooling_type"), ()),
    "late_chunking": (("late_chunking", "return_multivector"), (False,)),
}
MEANING_OF = {name: meaning for meaning, (names, _) in MEANINGS.items() for name in names}

# Names that callers use for the texts.
TEXT_FIELDS = (
    *("texts", "inputs", "input", "instances", "text", "prompt", "sentence", "sentences", "content"),
    *("document", "documents", "data", "query"),
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
        current().asked = {path: (path, value)}
        meant = None if parent else _texts_meant(name, names, sent)
        if near:
            meant = nearest(name[:50], names) or meant
        meaning = MEANING_OF.get(name)
        if meant is None and meaning is not None:
            accepted = (normalizes,) if meaning == "normalize" else MEANINGS[meaning][1]
            if value in accepted:
                continue
            meant = next((each for each in MEANINGS[meaning][0] if each in names), None)
            if meant is None:
                raise InvalidRequest("is not supported here, and would change the vectors", field=path)
        if meant is not None:
            raise InvalidRequest(f"is not a field here; use {meant}", field=path)


def _texts_meant(name: str, known: tuple[str, ...], sent: Mapping[str, Any]) -> str | None:
    """The route's field for texts, if the body has none, and this one probably holds them."""
    own = [each for each in TEXT_FIELDS if each in known]
    return own[0] if own and name in TEXT_FIELDS and sent.keys().isdisjoint(own) else None
