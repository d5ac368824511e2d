"""Declares what a view accepts, returns and raises; the OpenAPI document is built from this."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

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

View = TypeVar("View", bound=Callable[..., Any])

# A view with a body passes it to the model, and may raise all of these.
READING = (InvalidRequest, SlowUpload, TooLarge, UnsupportedMediaType)
ON_BODY = (*READING, Overloaded, ModelFailure, Unavailable, DeadlineExceeded)


class RouteSpec(msgspec.Struct, frozen=True):
    """Describes the decorated view.

    `answers` maps each status to its body's type: a tuple for alternatives, None for no body. `media` lists
    their content types; errors are always JSON. `query` has the values that each field of the query may have.
    `body` is the decoder that the view uses. The headers of an
    answer count the tokens that were read if the view `reads_tokens`, and also say where the time went if it
    `embeds`. `public` views need no key; `described` ones appear in the OpenAPI document. `variant` is
    another protocol's view, which handles requests to the same route that have its fields.
    """

    answers: Mapping[int, Any]
    media: tuple[str, ...] = ("application/json",)
    query: Mapping[str, Sequence[str]] = {}
    body: BodyDecoder[Any] | None = None
    raises: tuple[type[ServiceError], ...] = ()
    reads_tokens: bool = False
    embeds: bool = False
    public: bool = False
    described: bool = True
    variant: Callable[..., Any] | None = None

    def __call__(self, view: View) -> View:
        view.spec = self  # type: ignore[attr-defined]
        return view

    def errors(self) -> tuple[type[ServiceError], ...]:
        """All that the view may raise."""
        on_vectors = (FingerprintMismatch,) if self.reads_tokens or self.embeds else ()
        return self.raises + (ON_BODY if self.body else ()) + on_vectors


def spec_of(view: Callable[..., Any]) -> RouteSpec | None:
    """What describes the view, if anything does."""
    return getattr(view, "spec", None)


def shape(name: str, meaning: str, /, **fields: Any) -> Any:
    """The type of a JSON object, for the API's description. `[X]` is a list of X."""
    for field, kind in fields.items():
        if isinstance(kind, list):
            fields[field] = list.__class_getitem__(kind[0])
    made: Any = TypedDict(name, fields)  # type: ignore[misc]
    made.__doc__ = meaning
    return made
