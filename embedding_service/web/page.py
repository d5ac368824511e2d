"""GET /: the page where a person tries texts, and its files; everything on it comes from this service."""

import hashlib
from pathlib import Path

from flask import Blueprint, Response, render_template, send_from_directory

from embedding_service.web.operation import operation

STATIC = Path(__file__).with_name("static")

# Part of every file's address, so that a browser may keep a file for good and still gets a new one.
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))).hexdigest()[:12]

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

blueprint = Blueprint("page", __name__, template_folder="templates")


@blueprint.get("/")
@operation({200: str}, media=("text/html",), public=True)
def page() -> Response:
    """The page; it asks /health, /info and POST /embed for everything that it shows."""
    response = Response(render_template("page.html", version=VERSION), mimetype="text/html")
    response.headers["Cache-Control"] = "no-cache"
    response.headers.extend(SECURITY_HEADERS)
    return response


@blueprint.get("/static/<version>/<path:name>")
@operation({}, public=True, described=False)
def static_file(version: str, name: str) -> Response:
    """One of the page's files; another version's address gets ours, and must not be kept."""
    response = send_from_directory(STATIC, name)
    known = version == VERSION
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if known else "no-cache"
    response.headers.extend(SECURITY_HEADERS)
    return response
