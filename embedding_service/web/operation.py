"""What a view takes, answers and raises, said beside it: the OpenAPI document is made of this."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from embedding_service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailure,
    Overloaded,
    ServiceError,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from embedding_service.web.body import BodyDecoder

JSON = "application/json"

View = TypeVar("View", bound=Callable[..., Any])

# A view that reads a body hands it to the model, and may raise all of these.
ON_BODY = (
    InvalidRequest,
    TooLarge,
    UnsupportedMediaType,
    Overloaded,
    ModelFailure,
    Unavailable,
    DeadlineExceeded,
)


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One view. `answers` has the type of the body by status: a tuple for one of several, None for none.

    `media` are the content types of the answers; errors are always JSON. `variant` is a view of
    another protocol that answers the same route when its fields are sent. `public` views are read
    without a key; `described` ones are in the OpenAPI document.
    """

    answers: Mapping[int, Any]
    media: tuple[str, ...]
    body: BodyDecoder[Any] | None
    raises: tuple[type[ServiceError], ...]
    embeds: bool
    public: bool
    described: bool
    variant: Callable[..., Any] | None


# Where a view carries its Operation.
ATTRIBUTE = "operation"


def operation(
    answers: Mapping[int, Any],
    *,
    media: tuple[str, ...] = (JSON,),
    body: BodyDecoder[Any] | None = None,
    raises: tuple[type[ServiceError], ...] = (),
    embeds: bool = False,
    public: bool = False,
    described: bool = True,
    variant: Callable[..., Any] | None = None,
) -> Callable[[View], View]:
    """Describe the view below; `body` is the very decoder that validates its requests."""

    def describe(view: View) -> View:
        found = Operation(
            answers=answers,
            media=media,
            body=body,
            raises=raises + (ON_BODY if body else ()),
            embeds=embeds,
            public=public,
            described=described,
            variant=variant,
        )
        setattr(view, ATTRIBUTE, found)
        return view

    return describe


def operation_of(view: Callable[..., Any]) -> Operation | None:
    """What was said of the view, if anything."""
    return getattr(view, ATTRIBUTE, None)
