"""Amazon SageMaker (GET /ping, POST /invocations) and Google Vertex AI (POST /predict), with TEI's bodies."""

from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np
from flask import Flask, Response
from msgspec import Meta

from embedding_service.engine import Text, Vectors
from embedding_service.errors import InvalidRequest
from embedding_service.settings.config import Config
from embedding_service.web.body import BodyDecoder, parse, read
from embedding_service.web.health import HealthAnswer, health
from embedding_service.web.options import embed
from embedding_service.web.protocol import EMPTY, ApiProtocol
from embedding_service.web.protocols import tei
from embedding_service.web.responses import Matrix, answer, vector_headers
from embedding_service.web.route_spec import RouteSpec, shape
from embedding_service.web.token_ids import Inputs, texts_of

protocol = ApiProtocol(
    "clouds",
    "SageMaker and Vertex AI",
    tei.render,
    tei.TEIErrorAnswer,
    paths=("/invocations", "/predict", "/vertex"),
    names={"texts": "instances"},
)


class VertexInstance(tei.TEIParameters, frozen=True, kw_only=True):
    """A text to embed, under one of three names, and how; `inputs` may be several on /vertex."""

    inputs: Inputs | None = None
    content: str | None = None
    text: str | None = None
    task_type: Any = None


class VertexBody(msgspec.Struct, frozen=True):
    """Texts to embed, one per instance, and how."""

    instances: Annotated[list[str | VertexInstance], Meta(examples=[[{"content": "hello"}, "world"]])]
    parameters: tei.TEIParameters | None = None


VertexAnswer = shape("VertexAnswer", "A vector for each instance.", predictions=Matrix)
TEIVertexAnswer = shape("TEIVertexAnswer", "A list of one vector per instance.", predictions=list[Matrix])


_decoder = BodyDecoder(VertexBody)


def serve_vertex_routes(app: Flask, settings: Config) -> None:
    """Answer on the paths that Vertex AI chose for this container, unless they are served already."""
    taken = {rule.rule for rule in app.url_map.iter_rules()}
    if settings.aip_health_route and settings.aip_health_route not in taken:
        app.add_url_rule(settings.aip_health_route, f"{protocol.name}.aip_health", health)
    if settings.aip_predict_route and settings.aip_predict_route not in taken:
        app.add_url_rule(
            settings.aip_predict_route, f"{protocol.name}.aip_predict", predict, methods=["POST"]
        )


@protocol.get("/ping")
@RouteSpec({200: HealthAnswer, 503: HealthAnswer}, public=True)
def ping() -> Response:
    """SageMaker's health check: 200 only if the service can serve requests."""
    return health()


@protocol.post("/invocations")
@RouteSpec({200: Matrix}, body=tei.embed_decoder, embeds=True)
def invocations() -> Response:
    """SageMaker: embed one or more texts; the response is the bare vectors, as in TEI."""
    return tei.embed_raw(read())


@protocol.post("/predict")
@RouteSpec({200: VertexAnswer}, body=_decoder, embeds=True)
def predict() -> Response:
    """Vertex AI: embed the text of each instance."""
    by_instance = _vectors()
    for index, vectors in enumerate(by_instance):
        if len(vectors) > 1:
            raise InvalidRequest("must have one text", field="texts", index=index)
    return answer({"predictions": np.concatenate(by_instance)}, headers=vector_headers())


@protocol.post("/vertex")
@RouteSpec({200: TEIVertexAnswer}, body=_decoder, embeds=True)
def vertex() -> Response:
    """The same as in TEI, where a prediction is a list of vectors."""
    return answer({"predictions": _vectors()}, headers=vector_headers())


def _vectors() -> list[Vectors]:
    """The vectors of each instance."""
    body = parse(_decoder)
    if not body.instances:
        raise InvalidRequest(EMPTY, field="texts")
    instances = [VertexInstance(inputs=each) if isinstance(each, str) else each for each in body.instances]
    texts = [_texts_of(each, index) for index, each in enumerate(instances)]
    options, *others = {tei.merged(each, body.parameters) for each in instances}
    if others:
        raise InvalidRequest("must all have the same options", field="texts")
    if options.overflow == "chunks":
        raise InvalidRequest('is "chunks"; a text has one vector here', field="overflow")
    owners = [index for index, own in enumerate(texts) for _ in own]
    vectors = embed(list(chain.from_iterable(texts)), options, lambda at: ("instances", owners[at])).vectors
    return np.split(vectors, np.cumsum([len(own) for own in texts])[:-1])


def _texts_of(instance: VertexInstance, index: int) -> list[Text]:
    if instance.task_type is not None:
        raise InvalidRequest(
            "has a task_type, which is not supported; send parameters.prompt_name", field="texts", index=index
        )
    sent = [each for each in (instance.inputs, instance.content, instance.text) if each is not None]
    if len(sent) != 1:
        raise InvalidRequest(
            "must have its text in one of inputs, content and text", field="texts", index=index
        )
    try:
        return texts_of(sent[0])
    except InvalidRequest as error:
        error.index = index
        raise
