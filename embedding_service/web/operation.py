"""Declares what a view accepts, returns and raises; the OpenAPI document is built from this."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from embedding_service.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelFailure,
    Overloaded,
    ServiceError,
    SlowUpload,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from embedding_service.web.body import BodyDecoder

JSON = "application/json"

View = TypeVar("View", bound=Callable[..., Any])

# A view with a body passes it to the model, and may raise all of these.
ON_BODY = (
    InvalidRequest,
    SlowUpload,
    TooLarge,
    UnsupportedMediaType,
    Overloaded,
    ModelFailure,
    Unavailable,
    DeadlineExceeded,
)


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """A view. `answers` maps each status to its body's type: a tuple for alternatives, None for no body.

    `media` lists the content types of the answers; errors are always JSON. `variant` is another
    protocol's view, which handles requests to the same route that have its fields. `public` views need no
    key; `described` ones appear in the OpenAPI document. The headers of an answer count the tokens that were
    read if the view `reads_tokens`, and say where the time went if it `embeds`.
    """

    answers: Mapping[int, Any]
    media: tuple[str, ...]
    body: BodyDecoder[Any] | None
    raises: tuple[type[ServiceError], ...]
    reads_tokens: bool
    embeds: bool
    public: bool
    described: bool
    variant: Callable[..., Any] | None


# The attribute that holds a view's Operation.
ATTRIBUTE = "operation"


def operation(
    answers: Mapping[int, Any],
    *,
    media: tuple[str, ...] = (JSON,),
    body: BodyDecoder[Any] | None = None,
    raises: tuple[type[ServiceError], ...] = (),
    reads_tokens: bool = False,
    embeds: bool = False,
    public: bool = False,
    described: bool = True,
    variant: Callable[..., Any] | None = None,
) -> Callable[[View], View]:
    """Describe the decorated view; `body` is the decoder that it uses."""

    def describe(view: View) -> View:
        found = Operation(
            answers=answers,
            media=media,
            body=body,
            raises=raises
            + (ON_BODY if body else ())
            + ((FingerprintMismatch,) if reads_tokens or embeds else ()),
            reads_tokens=reads_tokens or embeds,
            embeds=embeds,
            public=public,
            described=described,
            variant=variant,
        )
        setattr(view, ATTRIBUTE, found)
        return view

    return describe


def operation_of(view: Callable[..., Any]) -> Operation | None:
    """The view's Operation, if it has one."""
    return getattr(view, ATTRIBUTE, None)
