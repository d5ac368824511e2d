"""One request under way: when it began, its id, its deadline, and the protocol that it is answered in."""

import re
import time
import uuid
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from flask import Request, current_app, has_request_context, request

if TYPE_CHECKING:
    from embedding_service.web.protocol import Protocol

SLASHES = re.compile("/{2,}")
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class ServiceRequest(Request):
    """Flask's request with what we know of it besides; it ends with the request, and nothing outlives it."""

    protocol: "Protocol | None" = None

    def __init__(self, environ: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        if "//" in environ["PATH_INFO"]:
            # A base URL that ends in a slash. A redirect would turn some clients' POST into a GET.
            environ["PATH_INFO"] = SLASHES.sub("/", environ["PATH_INFO"])
        super().__init__(environ, *args, **kwargs)

    @cached_property
    def id(self) -> str:
        """The caller's id if it is sane, else a new one."""
        given = self.environ.get("HTTP_X_REQUEST_ID", "")
        return given if SANE_ID.fullmatch(given) else uuid.uuid4().hex

    @property
    def deadline(self) -> float:
        """When the answer must be there, on the clock of time.monotonic()."""
        seconds: float = current_app.extensions["embedding_service"].settings.request_timeout_seconds
        return self.began + seconds

    @property
    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.began


def current() -> ServiceRequest:
    """The request under way."""
    return cast(ServiceRequest, request)


def current_id() -> str | None:
    """The id of the request under way; None outside of one."""
    return current().id if has_request_context() else None
