"""Protocol: the routes of one API, and the form in which its clients expect an error."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from flask import Blueprint, current_app, g, request


class Failure(msgspec.Struct, frozen=True):
    """An error in the words of the native protocol: its status, error_type and message."""

    status: int
    error_type: str
    message: str


Render = Callable[[Failure], tuple[Mapping[str, Any], int]]


class Protocol(Blueprint):
    """A blueprint whose errors are rendered its own way, also those of unknown paths below `paths`."""

    def __init__(
        self, name: str, title: str, render: Render, error: type, paths: tuple[str, ...] = ()
    ) -> None:
        """`error` is the type of the body that `render` makes of a Failure, beside the status."""
        super().__init__(name, __name__)
        self.title = title
        self.render = render
        self.error = error
        self.paths = paths


def speak(protocol: Protocol) -> None:
    """Answer the rest of this request in another protocol than its route's own."""
    g.protocol = protocol


def spoken() -> Protocol | None:
    """The protocol of this request, if any: chosen, of its route, or of its path."""
    found = g.get("protocol") or current_app.blueprints.get(request.blueprint or "")
    if isinstance(found, Protocol):
        return found
    if request.url_rule is None:
        for blueprint in current_app.blueprints.values():
            if isinstance(blueprint, Protocol) and request.path.startswith(blueprint.paths):
                return blueprint
    return None
