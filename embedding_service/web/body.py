"""Reads a request's body into a validated struct."""

import functools
import json
import re
import zlib
from codecs import BOM_UTF8
from typing import Any, Generic, TypeVar, cast, get_args

import msgspec
from werkzeug.wsgi import get_content_length

from embedding_service.errors import InvalidRequest, ServiceError, SlowUpload, TooLarge, UnsupportedMediaType
from embedding_service.web.context import current
from embedding_service.web.unknown_fields import check_others
from embedding_service.web.validation_errors import explain

Body = TypeVar("Body", bound=msgspec.Struct)
Decoded = TypeVar("Decoded")

GZIP = ("gzip", "x-gzip")
# A gzip body is read in blocks. Its members are limited because even an empty one takes time.
MAX_MEMBERS, BLOCK_BYTES = 1000, 1 << 16
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


def try_decode(decoder: msgspec.json.Decoder[Decoded], raw: bytes) -> Decoded | None:
    """The body if it is of the decoder's type, else None, whatever is wrong with it."""
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class BodyDecoder(Generic[Body]):
    """Decodes bodies into a struct, and checks the fields that the struct does not have.

    A strict decoder, which accepts no extra fields, is tried first, so most bodies are decoded once.
    """

    def __init__(self, kind: type[Body], *, near: bool = False, normalizes: bool = True) -> None:
        """`near` and `normalizes` as in `check_others`."""
        self.type = kind
        self._near = near
        self._normalizes = normalizes
        self._exact = msgspec.json.Decoder(_without_others(kind))
        self._tolerant = msgspec.json.Decoder(kind)

    def decode(self, raw: bytes) -> Body:
        """Decode a body. Raises InvalidRequest, or UnsupportedMediaType for a form."""
        body = self.exact(raw)
        return self.tolerant(raw) if body is None else body

    def exact(self, raw: bytes) -> Body | None:
        """The body if it is valid and has no extra fields, else None, whatever is wrong with it."""
        try:
            return self._exact.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def tolerant(self, raw: bytes) -> Body:
        """Decode a body that is not exact; raises as `decode` does."""
        try:
            return self._decode_with_others(raw)
        except UnicodeDecodeError as error:
            raise _not_json(f"the body is not valid UTF-8: {error.reason}") from None
        except msgspec.DecodeError as error:
            # This is also what msgspec says of a text at the end that ends with half of a pair.
            is_half = "truncated" in str(error) and HIGH_SURROGATE.search(raw[-12:])
            reason = "a text ends with half of a surrogate pair" if is_half else error
            raise _not_json(f"the body is not valid JSON: {reason}") from None
        except RecursionError:
            raise InvalidRequest("the body is nested too deeply") from None

    def _decode_with_others(self, raw: bytes) -> Body:
        try:
            self._check_fields(self.type, msgspec.json.decode(raw))
            return self._tolerant.decode(raw)
        except msgspec.ValidationError:
            fault = explain(self.type, raw)
        try:
            # In JSON, 384.0 is a whole number.
            return msgspec.convert(json.loads(raw, parse_float=_whole), self.type)
        except (ValueError, OverflowError):
            raise fault from None

    def _check_fields(self, kind: type, value: Any, parent: str = "") -> None:
        if not isinstance(value, dict):
            return
        fields = _fields(kind)
        check_others(fields, value, parent, near=self._near, normalizes=self._normalizes)
        for name, structs in fields.items():
            for struct in structs:
                self._check_fields(struct, value.get(name), f"{parent}{name}.")


def _whole(number: str) -> int | float:
    value = float(number)
    return int(value) if value.is_integer() else value


def _without_others(kind: type[Body]) -> type[Body]:
    """A subclass that rejects unknown fields, in nested structs too."""
    overridden: list[Any] = []
    for field in msgspec.structs.fields(kind):
        if structs := _structs(field.type):
            (struct,) = structs
            inner: Any = _without_others(struct)
            optional: Any = inner | None
            overridden.append((field.name, inner) if field.required else (field.name, optional, None))
    made = msgspec.defstruct(
        kind.__name__, overridden, bases=(kind,), frozen=True, forbid_unknown_fields=True, kw_only=True
    )
    return cast(type[Body], made)


@functools.cache
def _fields(kind: type) -> dict[str, list[type[msgspec.Struct]]]:
    """The struct's fields by name, each with the structs that its value may be."""
    return {field.encode_name: _structs(field.type) for field in msgspec.structs.fields(kind)}


def _structs(kind: Any) -> list[type[msgspec.Struct]]:
    members = get_args(kind) or (kind,)
    return [each for each in members if isinstance(each, type) and issubclass(each, msgspec.Struct)]


class Fields(msgspec.Struct, frozen=True):
    """The two fields that may hold the texts, to see which of them a body has."""

    texts: msgspec.Raw = msgspec.Raw(b"null")
    inputs: msgspec.Raw = msgspec.Raw(b"null")


_fields_decoder = msgspec.json.Decoder(Fields)


def texts_and_inputs(raw: bytes) -> tuple[bytes, bytes]:
    """The JSON of these fields; `null` if a body does not have them."""
    found = try_decode(_fields_decoder, raw) or Fields()
    return bytes(found.texts), bytes(found.inputs)


def parse(decoder: BodyDecoder[Body]) -> Body:
    """Decode the request's body, whatever its Content-Type."""
    return decoder.decode(read())


def _not_json(reason: str) -> ServiceError:
    """The error for a body that is not JSON, and perhaps a form.

    The Content-Type alone is no reason to reject a body, because `curl -d` labels JSON as a form. So another
    site can make its visitors' browsers post JSON here without a CORS preflight. It gains nothing: the key
    is in a header, which a form cannot set and browsers do not add by themselves, the response cannot be
    read across sites, and no request changes anything.
    """
    if current().mimetype in FORMS:
        return UnsupportedMediaType(
            "the body is a form; send JSON, and add -H 'Content-Type: application/json'"
        )
    return InvalidRequest(reason)


def read() -> bytes:
    """The whole body. Raises SlowUpload, TooLarge, UnsupportedMediaType, or InvalidRequest if it is empty."""
    request = current()
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
    if encoding not in ("identity", *GZIP):
        raise UnsupportedMediaType(
            f"the content encoding {encoding[:50]} is not supported; send gzip or none"
        )
    limit = request.service.settings.max_body_bytes
    length = get_content_length(request.environ)
    if (length or 0) > limit:
        raise TooLarge(f"the body is over {limit} bytes (MAX_BODY_BYTES)")
    # The length of a chunked body is unknown, so read one byte more than allowed to detect one that is too
    # large. The stream ends with the body.
    try:
        raw: bytes = request.environ["wsgi.input"].read(limit + 1 if length is None else length)
    except TimeoutError:
        raise SlowUpload("the request did not arrive in time") from None
    except Exception as error:
        # Each server raises its own errors for malformed chunks and slow or disconnected clients.
        raise InvalidRequest(f"the body could not be read ({type(error).__name__})") from None
    if len(raw) > limit:
        raise TooLarge(f"the body is over {limit} bytes (MAX_BODY_BYTES)")
    if len(raw) < (length or 0):
        raise InvalidRequest(f"the body ended after {len(raw)} of {length} bytes")
    if not raw:
        raise InvalidRequest("the body is empty; send a JSON object")
    if encoding in GZIP:
        raw = _decompressed(raw, limit)
    return raw.removeprefix(BOM_UTF8)


def _decompressed(raw: bytes, limit: int) -> bytes:
    """The decompressed body. Raises TooLarge as soon as it exceeds the limit."""
    parts: list[bytes] = []
    room = limit + 1
    members, member = 1, _gzip_member()
    try:
        for start in range(0, len(raw), BLOCK_BYTES):
            block = raw[start : start + BLOCK_BYTES]
            while block:
                if member.eof:
                    members, member = members + 1, _gzip_member()
                    if members > MAX_MEMBERS:
                        raise InvalidRequest(f"the gzip body has more than {MAX_MEMBERS} members")
                parts.append(member.decompress(block, room))
                room -= len(parts[-1])
                if room <= 0:
                    raise TooLarge(f"the decompressed body is over {limit} bytes (MAX_BODY_BYTES)")
                block = member.unused_data
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid gzip: {error}") from None
    if not member.eof:
        raise InvalidRequest("the gzip body is incomplete")
    return b"".join(parts)


def _gzip_member() -> "zlib._Decompress":
    return zlib.decompressobj(zlib.MAX_WBITS | 16)
