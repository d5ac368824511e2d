"""Text Embeddings Inference: POST / and /embed with `inputs`, POST /tokenize and /similarity."""

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service.engine import (
    Embeddings,
    EmbedRequest,
    ListTokensRequest,
    TokenizedText,
    TokenVectorsRequest,
)
from embedding_service.errors import InvalidRequest, TooLarge
from embedding_service.web.body import BodyDecoder, answer, parse, read
from embedding_service.web.context import context
from embedding_service.web.embedding import (
    ChunkOverlap,
    Dimensions,
    Matrix,
    OverflowField,
    Priority,
    Prompt,
    PromptName,
    Vector,
    answer_embeddings,
    ask,
    listed,
    overflow_of,
)
from embedding_service.web.limits import check_texts
from embedding_service.web.operation import operation
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.request import current
from embedding_service.web.token_vectors import Matrices, answer_tokens, ask_tokens

# A token takes about sixty bytes of JSON, so /tokenize accepts fewer characters than /embed.
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
    error_type = ERROR_TYPES.get(failure.error_type, "Validation")
    return {"error": failure.message, "error_type": error_type}, STATUSES.get(failure.status, failure.status)


protocol = ApiProtocol(
    "tei",
    "Text Embeddings Inference",
    render,
    TEIErrorAnswer,
    names={"texts": "inputs", "truncation_side": "truncation_direction"},
)

Truncate = Annotated[bool, Meta(description="Truncate over-long texts; false rejects them.")]
Direction = Annotated[
    Literal["left", "right", "Left", "Right"],
    Meta(description="The end at which over-long texts are truncated; by default the model's choice."),
]
Texts = Annotated[str | list[str], Meta(description="One or more texts.", examples=[["hello", "world"]])]


class TEIParameters(msgspec.Struct, frozen=True, kw_only=True):
    """How to embed."""

    normalize: Annotated[bool, Meta(description="Scale each vector to length 1.")] | None = None
    truncate: Truncate | None = None
    truncation_direction: Direction | None = None
    prompt_name: PromptName | None = None
    prompt: Prompt | None = None
    dimensions: Dimensions | None = None
    overflow: OverflowField | None = None
    chunk_overlap: ChunkOverlap | None = None
    priority: Priority | None = None


class TEIEmbedBody(TEIParameters, frozen=True, kw_only=True):
    """Texts to embed. Hugging Face's pipelines send the other fields in `parameters`."""

    inputs: Texts
    parameters: TEIParameters | None = None


class TEIEmbedAllBody(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed token by token."""

    inputs: Texts
    truncate: Annotated[Literal[True], Meta(description="Over-long texts are truncated.")] | None = None
    prompt_name: PromptName | None = None
    prompt: Prompt | None = None


class TokenizeBody(msgspec.Struct, frozen=True):
    """Texts to tokenize."""

    inputs: Texts
    add_special_tokens: bool | None = True


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


class SimilarityParameters(msgspec.Struct, frozen=True):
    """How to embed the sentences."""

    truncate: Truncate | None = None
    truncation_direction: Direction | None = None
    prompt_name: PromptName | None = None


class Comparison(msgspec.Struct, frozen=True):
    """Matches a body with sentences to compare, but not one with texts to embed."""

    inputs: dict[str, Any]


class SimilarityBody(msgspec.Struct, frozen=True):
    """Sentences to compare."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


embed_decoder = BodyDecoder(TEIEmbedBody)
embed_all_decoder = BodyDecoder(TEIEmbedAllBody)
_comparison_decoder = msgspec.json.Decoder(Comparison)
_tokenize_decoder = BodyDecoder(TokenizeBody)
_similarity_decoder = BodyDecoder(SimilarityBody)


@protocol.post("/similarity")
@operation({200: Vector}, body=_similarity_decoder, embeds=True)
def similarity() -> Response:
    """Compare a sentence with others; returns cosine similarities, in the order of the sentences."""
    return _compare(parse(_similarity_decoder))


def _compare(body: SimilarityBody) -> Response:
    if not body.inputs.sentences:
        raise InvalidRequest("is empty; send at least one sentence", field="inputs.sentences")
    parameters = body.parameters or SimilarityParameters()
    result = ask(
        EmbedRequest(
            texts=[body.inputs.source_sentence, *body.inputs.sentences],
            deadline=current().deadline,
            prompt_name=parameters.prompt_name,
            overflow="error" if parameters.truncate is False else "truncate",
            truncation_side=_side(parameters.truncation_direction),
        ),
        lambda index: ("inputs.sentences", index - 1) if index else ("inputs.source_sentence", None),
    )
    return answer_embeddings(result.vectors[1:] @ result.vectors[0], result)


@protocol.post("/")
@protocol.post("/v1")
@operation({200: Matrix}, body=embed_decoder, embeds=True, variant=similarity)
def embed() -> Response:
    """Embed one or more texts, or compare sentences as /similarity does; returns bare numbers."""
    raw = read()
    try:
        _comparison_decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return embed_raw(raw)
    return _compare(_similarity_decoder.decode(raw))


def embed_raw(raw: bytes) -> Response:
    """The response to a body that has been read."""
    body = embed_decoder.decode(raw)
    inner = msgspec.structs.asdict(body.parameters or TEIParameters())
    given = {name: getattr(body, name) if value is None else value for name, value in inner.items()}
    result = embed_texts(listed(body.inputs), TEIParameters(**given))
    return answer_embeddings(result.vectors, result)


def embed_texts(texts: list[str], given: TEIParameters) -> Embeddings:
    """Embed texts as the parameters say."""
    return ask(
        EmbedRequest(
            texts=texts,
            deadline=current().deadline,
            normalize=given.normalize is not False,
            prompt_name=given.prompt_name,
            prompt=given.prompt,
            dimensions=given.dimensions,
            truncation_side=_side(given.truncation_direction),
            priority=given.priority or "normal",
            overflow=overflow_of(given.overflow, given.truncate),
            overlap=given.chunk_overlap or 0,
        )
    )


@protocol.post("/embed_all")
@operation({200: Matrices}, body=embed_all_decoder, reads_tokens=True)
def embed_all() -> Response:
    """Embed each token; returns a list of vectors for each text, including those of special tokens."""
    body = parse(embed_all_decoder)
    request = TokenVectorsRequest(
        texts=listed(body.inputs),
        deadline=current().deadline,
        prompt_name=body.prompt_name,
        prompt=body.prompt,
    )
    return answer_tokens(ask_tokens(request))


@protocol.post("/tokenize")
@operation({200: list[list[Token]]}, body=_tokenize_decoder)
def tokenize() -> Response:
    """List the tokens of texts of any length, with the characters that each token covers."""
    body = parse(_tokenize_decoder)
    texts = listed(body.inputs)
    check_texts(texts)
    characters = sum(map(len, texts))
    if characters > MAX_TOKENIZE_CHARACTERS:
        raise TooLarge(
            f"has {characters} characters in all; at most {MAX_TOKENIZE_CHARACTERS} are allowed",
            field="texts",
        )
    request = ListTokensRequest(
        texts=texts, deadline=current().deadline, add_special_tokens=body.add_special_tokens is not False
    )
    tokenized = context().call(request).texts
    return answer([_tokens(text, tokens) for text, tokens in zip(texts, tokenized, strict=True)])


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


def _side(direction: str | None) -> Any:
    return direction.lower() if direction else None
