"""GET /: a page for trying the service, and its files; it loads nothing from other hosts."""

import hashlib
from pathlib import Path

from flask import Blueprint, Response, render_template, send_from_directory

from embedding_service.web.operation import operation

STATIC = Path(__file__).with_name("static")

# Part of every file's URL, so that browsers can cache files forever and still get new versions.
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
    """The page; all that it shows comes from /health, /info and POST /embed."""
    response = Response(render_template("page.html", version=VERSION), mimetype="text/html")
    response.headers["Cache-Control"] = "no-cache"
    response.headers.extend(SECURITY_HEADERS)
    return response


@blueprint.get("/static/<version>/<path:name>")
@operation({}, public=True, described=False)
def static_file(version: str, name: str) -> Response:
    """One of the page's files. The URL of another version returns the current file, and is not cached."""
    response = send_from_directory(STATIC, name)
    known = version == VERSION
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if known else "no-cache"
    response.headers.extend(SECURITY_HEADERS)
    return response
