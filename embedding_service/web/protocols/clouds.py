"""Amazon SageMaker (GET /ping, POST /invocations) and Google Vertex AI (POST /predict), with TEI's bodies."""

from typing import Annotated, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service.errors import InvalidRequest
from embedding_service.web.body import BodyDecoder, parse, read
from embedding_service.web.embedding import Matrix, answer_embeddings
from embedding_service.web.health import HealthAnswer, health
from embedding_service.web.operation import operation
from embedding_service.web.protocol import Protocol
from embedding_service.web.protocols import tei

protocol = Protocol(
    "clouds",
    "SageMaker and Vertex AI",
    tei.render,
    tei.TEIErrorAnswer,
    paths=("/invocations", "/predict"),
    names={"texts": "instances"},
)


class VertexInstance(msgspec.Struct, frozen=True):
    """A text to embed."""

    inputs: str


class VertexBody(msgspec.Struct, frozen=True):
    """Texts to embed, one an instance, and how."""

    instances: Annotated[list[VertexInstance], Meta(examples=[[{"inputs": "hello"}]])]
    parameters: tei.TEIParameters | None = None


class VertexAnswer(TypedDict):
    """A vector for each instance."""

    predictions: Matrix


_decoder = BodyDecoder(VertexBody)


@protocol.get("/ping")
@operation({200: HealthAnswer, 503: HealthAnswer}, public=True)
def ping() -> Response:
    """SageMaker's health check: 200 only if the service can serve requests."""
    return health()


@protocol.post("/invocations")
@operation({200: Matrix}, body=tei.embed_decoder, embeds=True)
def invocations() -> Response:
    """SageMaker: embed one text or many; the answer is the bare vectors, as from TEI."""
    return tei.embed_raw(read())


@protocol.post("/predict")
@operation({200: VertexAnswer}, body=_decoder, embeds=True)
def predict() -> Response:
    """Vertex AI: embed the text of each instance."""
    body = parse(_decoder)
    if not body.instances:
        raise InvalidRequest("is empty; send at least one text", field="texts")
    result = tei.embed_texts([each.inputs for each in body.instances], body.parameters or tei.TEIParameters())
    return answer_embeddings({"predictions": result.vectors}, result)
