"""A protocol: the routes, field names and error format of one API."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from flask import Blueprint

from embedding_service.errors import ServiceError, sentence

# A reason that some protocols have a status of their own for.
EMPTY = "is empty; send at least one text"


class Failure(msgspec.Struct, frozen=True):
    """An error before rendering. `index` and `field` are as in ServiceError, with the protocol's names."""

    status: int
    error_type: str
    reason: str
    index: int | None = None
    field: str | None = None

    @property
    def message(self) -> str:
        """The error as a sentence."""
        return sentence(self.reason, self.index, self.field)


# What a caller asked for: by meaning, the field and its value.
Asked = Mapping[str, tuple[str, Any]]
Render = Callable[[Failure], tuple[Mapping[str, Any], int]]


class ApiProtocol(Blueprint):
    """A blueprint with its own error format, which also applies to unknown paths below `paths`."""

    def __init__(
        self,
        name: str,
        title: str,
        render: Render,
        error: type,
        *,
        paths: tuple[str, ...] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        """`error` is the type of the body that `render` returns along with the status.

        `names` maps fields of EmbedRequest to this protocol's names for them.
        """
        super().__init__(name, __name__)
        self.title = title
        self.render = render
        self.error = error
        self.paths = paths
        self._names = names or {}

    def failure(self, error: ServiceError, asked: Asked) -> Failure:
        """The error, with the names that the caller sent, or else this protocol's."""
        field = error.field if error.index is None else error.field or "texts"
        if field is not None:
            field = asked[field][0] if field in asked else self._names.get(field, field)
        return Failure(error.status, error.error_type, error.reason, error.index, field)
