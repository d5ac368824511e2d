"""Cohere: POST /v2/embed and /v1/embed, for texts."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service.engine import Embeddings, EmbedRequest
from embedding_service.errors import InvalidRequest
from embedding_service.quantization import Precision
from embedding_service.web.body import BodyDecoder, parse
from embedding_service.web.context import context
from embedding_service.web.embedding import (
    ChunkOverlap,
    Dimensions,
    OverflowField,
    answer_embeddings,
    ask,
    encoded,
    in_precision,
    overflow_of,
)
from embedding_service.web.operation import operation
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.request import current, current_id


class CohereErrorAnswer(TypedDict):
    """An error in Cohere's format."""

    id: str | None
    message: str


def render(failure: Failure) -> tuple[CohereErrorAnswer, int]:
    """Cohere's error; its SDK chooses the exception class by status."""
    return {"id": current_id(), "message": failure.message}, failure.status


protocol = ApiProtocol(
    "cohere",
    "Cohere",
    render,
    CohereErrorAnswer,
    paths=("/v2/", "/v1/embed"),
    names={"dimensions": "output_dimension"},
)

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]

# Cohere's names for the two sides of a search.
SIDES: dict[str, Literal["query", "document"]] = {"search_query": "query", "search_document": "document"}


class CohereContent(msgspec.Struct, frozen=True):
    """A part of an input: a text."""

    type: Literal["text", "image_url"]
    text: str | None = None


class CohereInput(msgspec.Struct, frozen=True):
    """An input, which is one text."""

    content: list[CohereContent]


class CohereEmbedBody(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed, in `texts` or `inputs`."""

    texts: Annotated[list[str], Meta(examples=[["hello", "world"]])] | None = None
    inputs: list[CohereInput] | None = None
    images: Annotated[list[str], Meta(description="Not supported: the model reads text.")] | None = None
    model: Annotated[str, Meta(description="Any name; there is only one model.")] | None = None
    input_type: (
        Annotated[
            Literal["search_document", "search_query", "classification", "clustering"],
            Meta(description="Use the model's own prompt for this, if it has one."),
        ]
        | None
    ) = None
    embedding_types: (
        Annotated[list[EmbeddingType], Meta(description="Number formats of the embeddings.")] | None
    ) = None
    output_dimension: Dimensions | None = None
    truncate: (
        Annotated[
            Literal["NONE", "START", "END"],
            Meta(description="The end at which over-long texts are truncated; NONE rejects them."),
        ]
        | None
    ) = None
    max_tokens: (
        Annotated[int, Meta(ge=1, le=1_000_000, description="If set, at least the model's maximum.")] | None
    ) = None
    priority: Annotated[int, Meta(ge=0, le=999, description="Not used.")] | None = None
    overflow: OverflowField | None = None
    chunk_overlap: ChunkOverlap | None = 0


class CohereUnits(TypedDict):
    """How many tokens the model read."""

    input_tokens: int


class CohereVersion(TypedDict):
    """The version of the API."""

    version: str


class CohereMeta(TypedDict):
    """Details of the request."""

    api_version: CohereVersion
    billed_units: CohereUnits


class CohereEmbedAnswer(TypedDict):
    """The embeddings by number format, or as a bare list if /v1/embed was called without formats."""

    id: str | None
    response_type: NotRequired[Literal["embeddings_floats", "embeddings_by_type"]]
    embeddings: Annotated[Any, Meta(description='By number format: {"float": [[…], …]}; or the bare list.')]
    texts: list[str]
    meta: CohereMeta


_decoder = BodyDecoder(CohereEmbedBody)


@protocol.post("/v2/embed")
@operation({200: CohereEmbedAnswer}, body=_decoder, embeds=True)
def embed_v2() -> Response:
    """Embed texts in one or more number formats."""
    body = parse(_decoder)
    texts, result = _embed(body)
    answer = _answer(texts, result, _by_type(body.embedding_types or ["float"], result), "2")
    return answer_embeddings(answer, result)


@protocol.post("/v1/embed")
@operation({200: CohereEmbedAnswer}, body=_decoder, embeds=True)
def embed_v1() -> Response:
    """Embed texts; without `embedding_types` the response has a bare list of vectors."""
    body = parse(_decoder)
    texts, result = _embed(body)
    if body.embedding_types:
        answer = _answer(texts, result, _by_type(body.embedding_types, result), "1")
        answer["response_type"] = "embeddings_by_type"
    else:
        answer = _answer(texts, result, encoded(result.vectors, "float"), "1")
        answer["response_type"] = "embeddings_floats"
    return answer_embeddings(answer, result)


def _embed(body: CohereEmbedBody) -> tuple[list[str], Embeddings]:
    texts = _texts(body)
    info = context().require_info()
    if body.max_tokens is not None and body.max_tokens < info.max_seq_length:
        raise InvalidRequest(
            f"must be at least {info.max_seq_length}, the model's maximum, or left out",
            field="max_tokens",
        )
    side: Literal["left", "right"] | None = None
    if body.truncate in ("START", "END"):
        side = "left" if body.truncate == "START" else "right"
    kind = body.input_type or ""
    request = EmbedRequest(
        texts=texts,
        deadline=current().deadline,
        input_type=SIDES.get(kind),
        prompt_name=kind if kind not in SIDES and kind in info.prompts else None,
        dimensions=body.output_dimension,
        truncation_side=side,
        overflow=overflow_of(body.overflow, None if body.truncate is None else body.truncate != "NONE"),
        overlap=body.chunk_overlap or 0,
    )
    return texts, ask(request, (lambda index: ("inputs", index)) if body.texts is None else None)


def _texts(body: CohereEmbedBody) -> list[str]:
    if body.images:
        raise InvalidRequest("is not supported: the model reads text", field="images")
    if body.texts is not None:
        if body.inputs is not None:
            raise InvalidRequest("cannot be sent together with texts", field="inputs")
        return body.texts
    if body.inputs is None:
        raise InvalidRequest("is missing", field="texts")
    texts = []
    for index, each in enumerate(body.inputs):
        contents = each.content
        if len(contents) != 1 or contents[0].type != "text" or contents[0].text is None:
            raise InvalidRequest("must have one content, a text", field="inputs", index=index)
        texts.append(contents[0].text)
    return texts


def _by_type(types: list[EmbeddingType], result: Embeddings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in types:
        if name == "base64":
            found[name] = encoded(result.vectors, "base64")
        else:
            precision: Precision = "float32" if name == "float" else name
            found[name] = in_precision(result.vectors, precision, field="embedding_types")
    return found


def _answer(texts: list[str], result: Embeddings, embeddings: Any, version: str) -> CohereEmbedAnswer:
    return {
        "id": current_id(),
        "embeddings": embeddings,
        "texts": texts,
        "meta": {"api_version": {"version": version}, "billed_units": {"input_tokens": result.tokens}},
    }
