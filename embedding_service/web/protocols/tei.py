"""Text Embeddings Inference, and Hugging Face's pipelines: `inputs` -> bare vectors, or tokens."""

from collections.abc import Sequence
from typing import Literal, TypedDict

import msgspec
from flask import Response

from embedding_service.engine import (
    DecodeRequest,
    ListTokensRequest,
    Text,
    TokenizedText,
    TokenVectorsRequest,
)
from embedding_service.errors import InvalidRequest, TooLarge
from embedding_service.web.body import BodyDecoder, parse, read, texts_and_inputs
from embedding_service.web.context import current
from embedding_service.web.options import Options, Prompt, embed_tokens
from embedding_service.web.options import embed as embed_texts
from embedding_service.web.protocol import EMPTY, ApiProtocol, Failure
from embedding_service.web.protocols import cohere
from embedding_service.web.responses import Matrices, Matrix, Texts, Vector, answer, listed, vector_headers
from embedding_service.web.route_spec import RouteSpec
from embedding_service.web.token_ids import IdLists, Inputs, texts_of

# A token takes about sixty bytes of JSON, so /tokenize accepts fewer characters than /embed, and /decode ids.
MAX_TOKENIZE_CHARACTERS = 1_000_000

# TEI's statuses and error types, if they differ from the native protocol's.
STATUSES = {400: 422, 500: 424}
ERROR_TYPES = {
    "internal": "Backend",
    "overloaded": "Overloaded",
    "timeout": "Backend",
    "unavailable": "Unhealthy",
    "unauthorized": "Unauthorized",
}


class TEIErrorAnswer(TypedDict):
    """An error in the format of Text Embeddings Inference."""

    error: str
    error_type: str


def render(failure: Failure) -> tuple[TEIErrorAnswer, int]:
    """Text Embeddings Inference's error, with its own statuses and the type in PascalCase."""
    if failure.reason == EMPTY:
        return {"error": failure.message, "error_type": "Empty"}, 400
    error_type = ERROR_TYPES.get(failure.error_type, "Validation")
    return {"error": failure.message, "error_type": error_type}, STATUSES.get(failure.status, failure.status)


protocol = ApiProtocol(
    "tei",
    "Text Embeddings Inference",
    render,
    TEIErrorAnswer,
    paths=("/rerank", "/embed_sparse", "/pipeline", "/classify"),
    names={"texts": "inputs", "truncation_side": "truncation_direction"},
)


class TEIParameters(Options, frozen=True, kw_only=True):
    """How to embed."""

    prompt: Prompt | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None


class TEIEmbedBody(TEIParameters, frozen=True, kw_only=True):
    """Texts to embed, or token ids. Hugging Face's pipelines send the other fields in `parameters`."""

    inputs: Inputs
    parameters: TEIParameters | None = None


class TEIEmbedAllBody(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed token by token."""

    inputs: Inputs
    truncate: Literal[True] | None = None
    prompt_name: str | None = None
    prompt: Prompt | None = None


class TokenizeBody(msgspec.Struct, frozen=True):
    """Texts to tokenize."""

    inputs: Texts
    add_special_tokens: bool | None = True


class DecodeBody(msgspec.Struct, frozen=True):
    """Token ids to decode: those of one text, or a list for each."""

    ids: IdLists
    skip_special_tokens: bool | None = True


class Token(TypedDict):
    """One token; `start` and `stop` count characters of the text, and special tokens have none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class SimilarityInputs(msgspec.Struct, frozen=True):
    """A sentence, and the sentences to compare it with."""

    source_sentence: str
    sentences: list[str]


class SimilarityBody(msgspec.Struct, frozen=True):
    """Sentences to compare."""

    inputs: SimilarityInputs
    parameters: TEIParameters | None = None


embed_decoder = BodyDecoder(TEIEmbedBody)
embed_all_decoder = BodyDecoder(TEIEmbedAllBody)
_tokenize_decoder = BodyDecoder(TokenizeBody)
_decode_decoder = BodyDecoder(DecodeBody)
_similarity_decoder = BodyDecoder(SimilarityBody)


@protocol.post("/similarity")
@RouteSpec({200: Vector}, body=_similarity_decoder, embeds=True)
def similarity() -> Response:
    """Compare a sentence with others; returns cosine similarities, in the order of the sentences."""
    return _compare(parse(_similarity_decoder))


def _compare(body: SimilarityBody) -> Response:
    if not body.inputs.sentences:
        raise InvalidRequest(EMPTY, field="inputs.sentences")
    result = embed_texts(
        [body.inputs.source_sentence, *body.inputs.sentences],
        body.parameters or TEIParameters(),
        lambda index: ("inputs.sentences", index - 1) if index else ("inputs.source_sentence", None),
    )
    return answer(result.vectors[1:] @ result.vectors[0], headers=vector_headers())


@protocol.post("/")
@protocol.post("/v1")
@protocol.post("/models/<path:name>")
@protocol.post("/pipeline/feature-extraction/<path:name>")
@protocol.post("/pipeline/sentence-similarity/<path:name>")
@RouteSpec({200: Matrix}, body=embed_decoder, embeds=True, variant=similarity)
def embed(name: str = "") -> Response:
    """Embed one or more texts, or compare sentences as /similarity does; returns bare numbers."""
    raw = read()
    texts, inputs = texts_and_inputs(raw)
    if inputs == b"null" and texts != b"null":
        # As litellm's `cohere/` does with this address.
        current().protocol = cohere.protocol
        return cohere.embed_raw(raw)
    if inputs.startswith(b"{"):
        return _compare(_similarity_decoder.decode(raw))
    return embed_raw(raw)


def embed_raw(raw: bytes) -> Response:
    """The response to a body that has been read."""
    body = embed_decoder.decode(raw)
    texts = texts_of(body.inputs)
    result = embed_texts(texts, merged(body, body.parameters))
    headers = vector_headers()
    headers += [
        ("x-compute-characters", str(sum(map(len, texts)))),
        ("x-compute-time", dict(headers)["x-total-time"]),
    ]
    return answer(result.vectors, headers=headers)


def merged(outer: TEIParameters, inner: TEIParameters | None) -> TEIParameters:
    """The options that one of the two gives; the inner one wins."""
    given = msgspec.structs.asdict(inner or TEIParameters())
    return TEIParameters(
        **{name: getattr(outer, name) if value is None else value for name, value in given.items()}
    )


@protocol.post("/embed_all")
@RouteSpec({200: Matrices}, body=embed_all_decoder, reads_tokens=True)
def embed_all() -> Response:
    """Embed each token; returns a list of vectors for each text, including those of special tokens."""
    body = parse(embed_all_decoder)
    request = TokenVectorsRequest(
        texts=texts_of(body.inputs),
        deadline=current().deadline,
        prompt_name=body.prompt_name,
        prompt=body.prompt,
    )
    return answer(embed_tokens(request), headers=vector_headers())


@protocol.post("/tokenize")
@RouteSpec({200: list[list[Token]]}, body=_tokenize_decoder)
def tokenize() -> Response:
    """List the tokens of texts of any length, with the characters that each token covers."""
    body = parse(_tokenize_decoder)
    texts = listed(body.inputs)
    _check_total(texts, "characters")
    request = ListTokensRequest(
        texts=texts, deadline=current().deadline, add_special_tokens=body.add_special_tokens is not False
    )
    tokenized = current().call(request).texts
    return answer([_tokens(text, tokens) for text, tokens in zip(texts, tokenized, strict=True)])


@protocol.post("/decode")
@RouteSpec({200: list[str]}, body=_decode_decoder)
def decode() -> Response:
    """Decode token ids of the model's vocabulary into texts."""
    body = parse(_decode_decoder)
    current().asked = {"texts": ("ids", None)}
    lists = texts_of(body.ids)
    _check_total(lists, "ids")
    request = DecodeRequest(
        texts=lists, deadline=current().deadline, skip_special_tokens=body.skip_special_tokens is not False
    )
    return answer(current().call(request).texts)


def _check_total(texts: Sequence[Text], unit: str) -> None:
    if (total := sum(map(len, texts))) > MAX_TOKENIZE_CHARACTERS:
        raise TooLarge(
            f"has {total} {unit} in all; at most {MAX_TOKENIZE_CHARACTERS} are allowed", field="texts"
        )


def _tokens(text: str, tokenized: TokenizedText) -> list[Token]:
    tokens: list[Token] = []
    spans = zip(tokenized.ids, tokenized.starts, tokenized.stops, strict=True)
    for position, (number, start, stop) in enumerate(spans):
        name = tokenized.special.get(position)
        token: Token = (
            {"id": number, "text": text[start:stop], "special": False, "start": start, "stop": stop}
            if name is None
            else {"id": number, "text": name, "special": True, "start": None, "stop": None}
        )
        tokens.append(token)
    return tokens
