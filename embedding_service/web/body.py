"""Reading requests and writing answers: bytes to a validated struct, and a dict to bytes."""

from typing import Any, TypeVar

import msgspec
import orjson
from flask import Response, request

from embedding_service.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from embedding_service.web.context import context
from embedding_service.web.explain import explain

Body = TypeVar("Body")

FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def parse(decoder: msgspec.json.Decoder[Body]) -> Body:
    """The request's body as the decoder's struct, whatever its Content-Type says."""
    return decode(decoder, read())


def decode(decoder: msgspec.json.Decoder[Body], raw: bytes) -> Body:
    """The bytes as the decoder's struct. Raises InvalidRequest."""
    try:
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError:
            # The rest of the body has not been read by now, and may be no JSON.
            raise explain(decoder.type, raw) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason}") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def read() -> bytes:
    """The whole body. Raises TooLarge, UnsupportedMediaType, or InvalidRequest where it is empty."""
    if request.mimetype in FORMS:
        raise UnsupportedMediaType(
            "the body is sent as a form; add -H 'Content-Type: application/json' and send JSON"
        )
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise UnsupportedMediaType("compressed bodies are not read; send the JSON as it is")
    limit = context().settings.max_body_bytes
    length = request.content_length
    if (length or 0) > limit:
        raise TooLarge(f"the body is over {limit} bytes")
    # One byte more than allowed, since a chunked body does not say how long it is; the stream
    # itself ends where the body does.
    try:
        raw: bytes = request.environ["wsgi.input"].read(limit + 1 if length is None else length)
    except Exception as error:
        # Whatever the server calls it: a malformed chunk, a client that is too slow, or gone.
        raise InvalidRequest(f"the body could not be read ({type(error).__name__})") from None
    if len(raw) > limit:
        raise TooLarge(f"the body is over {limit} bytes")
    if len(raw) < (length or 0):
        raise InvalidRequest(f"the body ended after {len(raw)} of {length} bytes")
    if not raw:
        raise InvalidRequest("the body is empty; send a JSON object")
    return raw


def answer(body: Any, status: int = 200) -> Response:
    """A JSON response; numpy arrays of float32 are written as they lie."""
    return Response(
        orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), status, mimetype="application/json"
    )
