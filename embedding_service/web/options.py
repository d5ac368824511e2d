"""How to embed: the fields that most APIs have, and the names and values by which each API means the same."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from embedding_service.engine import Embeddings, EmbedRequest, Overflow, Text, TokenVectorsRequest, Vectors
from embedding_service.errors import InvalidRequest, ServiceError, TextTooLong
from embedding_service.web.context import current
from embedding_service.web.protocol import Asked
from embedding_service.web.unknown_fields import MEANINGS

Dimensions = Annotated[int, Meta(ge=1, le=65_536)]
# Limited because a copy of the prompt is put in front of each text, and a request may hold many short texts.
Prompt = Annotated[str, Meta(max_length=10_000)]
Side = Literal["query", "document", "passage", "search_query", "search_document"]
InputType = Literal[Side, "classification", "clustering", "text", "image"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to embed."""

    normalize: bool | None = None
    prompt_name: str | None = None
    input_type: InputType | None = None
    dimensions: Dimensions | None = None
    truncate: bool | Literal["NONE", "START", "END"] | None = None
    overflow: Overflow | None = None
    chunk_overlap: Annotated[int, Meta(ge=0, le=65_536)] | None = None
    priority: Literal["normal", "background"] | int | None = None


# The two sides of a search: NVIDIA and Weaviate say passage, Cohere search_query, Jina code.query.
Meant: TypeAlias = Literal["query", "document"]
NAMES: dict[str, Meant] = {"query": "query", "document": "document", "passage": "document"}
SIDES: dict[str, Meant] = {
    f"{before}{name}": side
    for name, side in NAMES.items()
    for before in (
        *("", "search_", "retrieval.", "code.", "nl2code.", "code2code."),
        *("code2nl.", "code2completion.", "qa."),
    )
}
# What a value for over-long texts means: whether they are truncated, and at which end.
Cut: TypeAlias = tuple[bool, Literal["left", "right"] | None]
CUTS: dict[Any, Cut] = {
    True: (True, None),
    False: (False, None),
    "END": (True, "right"),
    "START": (True, "left"),
    "NONE": (False, None),
}
SAME: dict[Any, Any] = SIDES | CUTS
# A value that truncates for each that does not, for advice.
CUTTING = {False: "true", "NONE": '"END"', "error": '"truncate"'}


# Maps the index of a text to the field and item in which the caller sent it.
Place = Callable[[int], tuple[str, int | None]]


def embed(
    texts: Sequence[Text],
    options: Options,
    place: Place | None = None,
    *,
    on_error: Literal["fail", "null"] = "fail",
    normalize: bool = True,
    parent: str = "",
    advice: str = '"truncate": true',
) -> Embeddings:
    """Embed the texts as the caller asked, by default with `normalize`.

    Without `place`, the texts are the items of the protocol's field for them. `parent` precedes the names
    of the options in the body, and `advice` is the field that truncates texts, if the caller sent none.
    """
    request = current()
    wanted = understand(texts, options, on_error, normalize=normalize, parent=parent)
    try:
        request.result = result = request.call(wanted, characters=on_error == "fail")
    except ServiceError as error:
        if isinstance(error, TextTooLong):
            asked = [request.asked[each] for each in ("overflow", "truncate") if each in request.asked]
            sent = " and ".join(f'"{name}": {CUTTING[value]}' for name, value in asked)
            error.reason += f"; send {sent or advice} to cut it"
        if place is not None and error.index is not None:
            error.field, error.index = place(error.index)
        raise
    request.tokens = result.tokens
    return result


def embed_tokens(wanted: TokenVectorsRequest) -> list[Vectors]:
    """The vectors of each text's tokens."""
    request = current()
    result = request.call(wanted)
    request.tokens = len(result.vectors)
    return np.split(result.vectors, np.cumsum(result.counts)[:-1])


def understand(
    texts: Sequence[Text],
    options: Options,
    on_error: Literal["fail", "null"] = "fail",
    *,
    normalize: bool = True,
    parent: str = "",
) -> EmbedRequest:
    """The request that the options describe. Raises InvalidRequest."""
    request = current()
    settings = request.service.settings
    asked = request.asked = _asked(options, parent)
    sent = {meaning: value for meaning, (_, value) in asked.items()}
    cut, side = _cut(asked) if "truncate" in asked else (None, None)
    overflow: Overflow | None = sent.get("overflow")
    if cut is not None:
        if overflow is not None and cut != (overflow == "truncate"):
            name, field = asked["overflow"][0], asked["truncate"][0]
            raise InvalidRequest(f"contradicts {name}; send one of the two", field=field)
        overflow = "truncate" if cut else overflow or "error"
    elif overflow is None:
        overflow = settings.default_overflow
    kind, prompt_name = sent.get("input_type"), sent.get("prompt_name")
    if kind == "image":
        raise InvalidRequest('is "image"; the model reads text', field="input_type")
    if prompt_name is None and kind is not None and kind not in SIDES:
        prompt_name = kind if kind in request.service.require_info().prompts else None
    limited = overflow in ("mean", "chunks") or on_error == "null"
    return EmbedRequest(
        texts=texts,
        deadline=request.deadline,
        normalize=sent.get("normalize", normalize),
        prompt_name=prompt_name,
        input_type=SIDES.get(kind or ""),
        prompt=sent.get("prompt"),
        dimensions=sent.get("dimensions"),
        truncation_side=sent.get("truncation_side", "").lower() or side,
        priority="background" if options.priority == "background" else "normal",
        overflow=overflow,
        overlap=options.chunk_overlap or 0,
        on_error=on_error,
        max_chunks=settings.max_texts_per_request if limited else None,
        max_characters=settings.max_text_characters if limited else None,
    )


def _asked(options: Options, parent: str) -> Asked:
    """Raises InvalidRequest if two fields with the same meaning contradict each other."""
    found: dict[str, tuple[str, Any]] = {}
    for name, meaning in _meanings(type(options)):
        value = getattr(options, name)
        if value is None:
            continue
        before, other = found.setdefault(meaning, (f"{parent}{name}", value))
        if SAME.get(other, other) != SAME.get(value, value):
            raise InvalidRequest(f"contradicts {before}; send one of the two", field=f"{parent}{name}")
    return found


@functools.cache
def _meanings(kind: type[Options]) -> list[tuple[str, str]]:
    """The fields of the struct that have a meaning in `MEANINGS`, each with it."""
    fields = {field.name for field in msgspec.structs.fields(kind)}
    return [
        (name, meaning)
        for meaning, (names, _) in MEANINGS.items()
        for name in names
        if name in fields and meaning not in ("precision", "pooling")
    ]


def _cut(asked: Asked) -> Cut:
    """Whether over-long texts are truncated, and at which end."""
    name, value = asked["truncate"]
    if isinstance(value, bool | str):
        return CUTS[value]
    # vLLM's number of tokens, which is ours only if it is the model's maximum; -1 means that.
    length = current().service.require_info().max_seq_length
    if value != -1 and value < length:
        raise InvalidRequest(f"must be at least {length}, the model's maximum, or -1", field=name)
    return True, None
