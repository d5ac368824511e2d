"""GET /openapi.json, and GET /docs, which renders it without fetching anything from another host."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import orjson
from flask import Blueprint, Flask, Response, current_app, render_template, request, send_from_directory

from embedding_service.web import page
from embedding_service.web.openapi import document
from embedding_service.web.operation import operation

blueprint = Blueprint("docs", __name__, template_folder="templates")

# The package that bundles Swagger UI's files; its code is not imported.
UI_PACKAGE = "flask_swagger_ui"
UI_FILES = {"swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"}

# Swagger UI uses inline styles, and images embedded in its stylesheet.
SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@blueprint.get("/openapi.json")
@blueprint.get("/api-doc/openapi.json")
@operation({200: dict[str, Any]})
def openapi() -> Response:
    """This document: OpenAPI 3.1."""
    return Response(_document(current_app._get_current_object()), mimetype="application/json")  # type: ignore[attr-defined]


@blueprint.get("/docs")
@operation({200: str}, media=("text/html",), public=True)
def show() -> Response:
    """This document for people, rendered by Swagger UI from files that this service hosts."""
    response = Response(
        render_template("docs.html", version=page.VERSION, here=_here()), mimetype="text/html"
    )
    response.headers["Content-Security-Policy"] = SECURITY_POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _here() -> str:
    """Relative path from the page to our root. A proxy may serve us under a prefix that we do not know."""
    return "../" if request.path.endswith("/") else ""


@blueprint.get("/docs/<name>")
@operation({}, public=True, described=False)
def file(name: str) -> Response:
    """One of Swagger UI's files."""
    return send_from_directory(_ui_folder(), name if name in UI_FILES else "", max_age=86400)


@functools.cache
def _ui_folder() -> Path:
    found = importlib.util.find_spec(UI_PACKAGE)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "dist"


@functools.cache
def _document(app: Flask) -> bytes:
    return orjson.dumps(document(app))
