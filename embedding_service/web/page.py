"""GET /, GET /docs and their files, which load nothing from other hosts; and GET /openapi.json."""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import orjson
from flask import Blueprint, Flask, Response, current_app, render_template, request, send_from_directory

from embedding_service.web.openapi import document
from embedding_service.web.route_spec import RouteSpec

STATIC = Path(__file__).with_name("static")
# The package that bundles Swagger UI's files; its code is not imported.
UI_PACKAGE = "flask_swagger_ui"
UI_FILES = {"swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"}

# Part of every file's URL, so that browsers can cache files forever and still get new versions.
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))).hexdigest()[:12]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self'{images}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY.format(styles="", images="") + "; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# Swagger UI uses inline styles, and images embedded in its stylesheet.
UI_SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY.format(styles=" 'unsafe-inline'", images=" data:"),
    "X-Content-Type-Options": "nosniff",
}

blueprint = Blueprint("page", __name__, template_folder="templates")


@blueprint.get("/")
@RouteSpec({200: str}, media=("text/html",), public=True)
def page() -> Response:
    """The page; all that it shows comes from /health, /info and POST /embed."""
    html = render_template("page.html", version=VERSION)
    return Response(html, mimetype="text/html", headers={"Cache-Control": "no-cache", **SECURITY_HEADERS})


@blueprint.get("/static/<version>/<path:name>")
@RouteSpec({}, public=True, described=False)
def static_file(version: str, name: str) -> Response:
    """One of the page's files. The URL of another version returns the current file, and is not cached."""
    response = send_from_directory(STATIC, name)
    known = version == VERSION
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if known else "no-cache"
    response.headers.extend(SECURITY_HEADERS)
    return response


@blueprint.get("/openapi.json")
@blueprint.get("/api-doc/openapi.json")
@RouteSpec({200: dict[str, Any]})
def openapi() -> Response:
    """This document: OpenAPI 3.1."""
    return Response(_document(current_app._get_current_object()), mimetype="application/json")  # type: ignore[attr-defined]


@functools.cache
def _document(app: Flask) -> bytes:
    return orjson.dumps(document(app))


@blueprint.get("/docs")
@RouteSpec({200: str}, media=("text/html",), public=True)
def docs() -> Response:
    """This document for people, rendered by Swagger UI from files that this service hosts."""
    # Relative to our root, since a proxy may serve us under a prefix that we do not know.
    here = "../" if request.path.endswith("/") else ""
    html = render_template("docs.html", version=VERSION, here=here)
    return Response(html, mimetype="text/html", headers=UI_SECURITY_HEADERS)


@blueprint.get("/docs/<name>")
@RouteSpec({}, public=True, described=False)
def docs_file(name: str) -> Response:
    """One of Swagger UI's files."""
    package = importlib.util.find_spec(UI_PACKAGE)
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "dist"
    return send_from_directory(folder, name if name in UI_FILES else "", max_age=86400)
