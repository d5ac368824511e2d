"""Cohere: POST /v2/embed and /v1/embed, for texts, and what its clients call before these."""

from typing import Annotated, Any, Literal, NotRequired

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service.engine import ListTokensRequest
from embedding_service.errors import InvalidRequest
from embedding_service.web.body import BodyDecoder, parse, read
from embedding_service.web.context import current, current_id
from embedding_service.web.options import Dimensions, Options, embed
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.responses import answer, encoded, vector_headers
from embedding_service.web.route_spec import RouteSpec, shape

CohereErrorAnswer = shape("CohereErrorAnswer", "An error in Cohere's format.", id=str | None, message=str)


def render(failure: Failure) -> tuple[dict[str, Any], int]:
    """Cohere's error; its SDK chooses the exception class by status."""
    return {"id": current_id(), "message": failure.message}, failure.status


protocol = ApiProtocol(
    "cohere",
    "Cohere",
    render,
    CohereErrorAnswer,
    paths=("/v2", "/v1/embed", "/v1/tokenize", "/v1/check-api-key"),
)

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class CohereContent(msgspec.Struct, frozen=True):
    """A part of an input: a text."""

    type: Literal["text", "image_url"]
    text: str | None = None


class CohereInput(msgspec.Struct, frozen=True):
    """An input, which is one text."""

    content: list[CohereContent]


class CohereEmbedBody(Options, frozen=True, kw_only=True):
    """Texts to embed, in `texts` or `inputs`."""

    texts: Annotated[list[str], Meta(examples=[["hello", "world"]])] | None = None
    inputs: list[CohereInput] | None = None
    images: list[str] | None = None
    model: str | None = None
    embedding_types: list[EmbeddingType] | None = None
    output_dimension: Dimensions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class CohereTokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """A text to tokenize."""

    text: Annotated[str, Meta(min_length=1, max_length=65_536, examples=["hello"])]
    model: str | None = None


CohereUnits = shape("CohereUnits", "How many tokens the model read.", input_tokens=int)
CohereVersion = shape("CohereVersion", "The version of the API.", version=str)
CohereMeta = shape(
    "CohereMeta", "Details of the request.", api_version=CohereVersion, billed_units=CohereUnits
)
CohereEmbedAnswer = shape(
    "CohereEmbedAnswer",
    "The embeddings by number format, or as a bare list if /v1/embed was called without formats.",
    id=str | None,
    response_type=NotRequired[Literal["embeddings_floats", "embeddings_by_type"]],
    embeddings=Any,
    texts=list[str],
    meta=CohereMeta,
)
CohereVersioned = shape(
    "CohereVersioned", "Details of a request that embeds nothing.", api_version=CohereVersion
)
CohereTokens = shape(
    "CohereTokens",
    "The tokens of the text, without special ones.",
    tokens=list[int],
    token_strings=list[str],
    meta=CohereVersioned,
)
CohereKeyCheck = shape(
    "CohereKeyCheck", "Whether the key is valid; a request with another one is refused.", valid=Literal[True]
)


_decoder = BodyDecoder(CohereEmbedBody)
_tokenize_decoder = BodyDecoder(CohereTokenizeBody)


@protocol.post("/v2/embed")
@RouteSpec({200: CohereEmbedAnswer}, body=_decoder, embeds=True)
def embed_v2() -> Response:
    """Embed texts in one or more number formats."""
    body = parse(_decoder)
    return _embed(body, "2", body.embedding_types or ["float"])


@protocol.post("/v1/embed")
@RouteSpec({200: CohereEmbedAnswer}, body=_decoder, embeds=True)
def embed_v1() -> Response:
    """Embed texts; without `embedding_types` the response has a bare list of vectors."""
    return embed_raw(read())


def embed_raw(raw: bytes) -> Response:
    """The response of /v1/embed to a body that has been read."""
    body = _decoder.decode(raw)
    kind = "embeddings_by_type" if body.embedding_types else "embeddings_floats"
    return _embed(body, "1", body.embedding_types or [], response_type=kind)


def _embed(body: CohereEmbedBody, version: str, types: list[EmbeddingType], **more: str) -> Response:
    texts = _texts(body)
    length = current().service.require_info().max_seq_length
    if body.max_tokens is not None and body.max_tokens < length:
        raise InvalidRequest(
            f"must be at least {length}, the model's maximum, or left out", field="max_tokens"
        )
    place = (lambda index: ("inputs", index)) if body.texts is None else None
    result = embed(texts, body, place, advice='"truncate": "END"')
    by_type = {
        name: encoded(result.vectors, name, as_base64=name == "base64", field="embedding_types")
        for name in types
    }
    found = {
        "id": current_id(),
        "embeddings": by_type or result.vectors,
        "texts": texts,
        "meta": {"api_version": {"version": version}, "billed_units": {"input_tokens": result.tokens}},
    }
    return answer(found | more, headers=vector_headers())


@protocol.post("/v1/tokenize")
@RouteSpec({200: CohereTokens}, body=_tokenize_decoder)
def tokenize() -> Response:
    """List the tokens of a text, by the model's own tokenizer."""
    texts = [parse(_tokenize_decoder).text]
    request = ListTokensRequest(texts=texts, deadline=current().deadline, add_special_tokens=False)
    (tokens,) = current().call(request).texts
    found = {
        "tokens": tokens.ids,
        "token_strings": [
            tokens.special.get(place, texts[0][start:stop])
            for place, (start, stop) in enumerate(zip(tokens.starts, tokens.stops, strict=True))
        ],
        "meta": {"api_version": {"version": "1"}},
    }
    return answer(found)


@protocol.post("/v1/check-api-key")
@RouteSpec({200: CohereKeyCheck})
def check_key() -> Response:
    """Confirm the key, which has been checked as that of every request."""
    return answer({"valid": True})


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
