"""The OpenAPI document, generated from the routes and the structs that validate their requests."""

import json
import re
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import msgspec
from flask import Flask
from werkzeug.routing import Rule

from embedding_service import __version__
from embedding_service.errors import InvalidRequest, Unauthorized
from embedding_service.web.context import EMPTY
from embedding_service.web.descriptions import EXAMPLES, FIELDS, HEADERS, TAGS
from embedding_service.web.operation import JSON, Operation, operation_of
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.protocols import native
from embedding_service.web.responses import NPY

REFERENCE = "#/components/schemas/{name}"

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "azure": {"type": "apiKey", "in": "header", "name": "api-key"},
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password."},
}

_NAMES = tuple(HEADERS)
ON_EVERY, ON_WAIT, ON_TOKENS, ON_VECTORS = _NAMES[:1], _NAMES[1:3], _NAMES[3:6], _NAMES[6:]


def document(app: Flask) -> dict[str, Any]:
    """The OpenAPI document, covering every route that has an Operation."""
    # The service's own route comes first, since readers start there.
    described = sorted(_operations(app), key=lambda operation: operation[0].rule != "/embed")
    schemas = Schemas([kind for _, view, found in described for kind in _types(app, view, found)])
    paths: dict[str, dict[str, Any]] = {}
    for rule, view, found in described:
        method = next(each for each in ("post", "delete", "get") if each.upper() in (rule.methods or ()))
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        name = re.sub(r"\W+", "_", method + (rule.rule if rule.rule != "/" else "/root")).rstrip("_")
        operation = _operation(app, rule, view, found, schemas)
        paths.setdefault(path, {})[method] = {"operationId": name, **operation}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Embedding service",
            "version": __version__,
            "description": "Text embeddings through several APIs, from one model and one queue.",
            "license": {"name": "MIT", "identifier": "MIT"},
            "contact": {"name": "The maintainers of the embedding service"},
        },
        "tags": [{"name": name, "description": TAGS.get(name, name)} for name in _titles(paths)],
        # Relative to this document, since a proxy may serve it under a prefix that we do not know.
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": {
                name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()
            },
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


def _titles(paths: dict[str, dict[str, Any]]) -> list[str]:
    operations = [operation for path in paths.values() for operation in path.values()]
    return list(dict.fromkeys(name for operation in operations for name in operation["tags"]))


class Schemas:
    """JSON schemas of types; a named type becomes a reference to `components`."""

    def __init__(self, types: list[Any]) -> None:
        distinct = list({repr(kind): kind for kind in types}.values())
        made, self.components = msgspec.json.schema_components(distinct, ref_template=REFERENCE)
        self._made = {repr(kind): schema for kind, schema in zip(distinct, made, strict=True)}
        for schema in self.components.values():
            _ease(schema)

    def one_of(self, types: list[Any], keyword: str = "anyOf") -> dict[str, Any]:
        """The schema of a value of one of the types."""
        schemas = [self._made[repr(kind)] for kind in types]
        distinct = [schema for index, schema in enumerate(schemas) if schema not in schemas[:index]]
        return distinct[0] if len(distinct) == 1 else {keyword: distinct}


def _ease(schema: dict[str, Any]) -> None:
    """Write a struct's schema so that generators of clients make usable types of it.

    A default makes its field required in some of them, so it moves into the description; an array of
    alternatives becomes alternative arrays.
    """
    for name, field in schema.get("properties", {}).items():
        default = field.pop("default", None)
        typed = next(iter(field.get("anyOf", ())), field)
        words = (
            typed.pop("description", "") or FIELDS.get(f"{schema['title']}.{name}") or FIELDS.get(name),
            f"Default: {json.dumps(default)}." if default is not None else "",
        )
        if any(words):
            field["description"] = " ".join(filter(None, words))
        for part in field.get("anyOf", [])[:]:
            if "anyOf" in part.get("items", {}) and schema["title"] in EXAMPLES:
                field["anyOf"].remove(part)
                field["anyOf"] += [{**part, "items": kind} for kind in part["items"]["anyOf"]]


def _operations(app: Flask) -> Iterator[tuple[Rule, Callable[..., Any], Operation]]:
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        found = operation_of(view)
        if found is not None and found.described:
            yield rule, view, found


def _operation(
    app: Flask, rule: Rule, view: Callable[..., Any], found: Operation, schemas: Schemas
) -> dict[str, Any]:
    summary, _, description = (view.__doc__ or "").partition("\n")
    described: dict[str, Any] = {
        "tags": [_protocol(app, view).title],
        "summary": summary,
        "description": description.strip() or summary,
        "responses": _responses(app, rule, view, found, schemas),
    }
    if rule.arguments:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in sorted(rule.arguments)
        ]
    if found.body is not None:
        bodies = [part.body.type for _, part in _variants(view, found) if part.body is not None]
        schema = schemas.one_of(bodies, "oneOf")
        names = [one["$ref"].rpartition("/")[2] for one in schema.get("oneOf", [schema])]
        examples = {name: {"value": EXAMPLES[name]} for name in names if name in EXAMPLES}
        content = {"schema": schema} | ({"examples": examples} if examples else {})
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    # Without keys in its settings, the service asks for none.
    described["security"] = [] if found.public else [{}, *({name: []} for name in SECURITY_SCHEMES)]
    return described


def _responses(
    app: Flask, rule: Rule, view: Callable[..., Any], found: Operation, schemas: Schemas
) -> dict[str, dict[str, Any]]:
    types: dict[int, list[Any]] = {405: []} if found.public else {}
    if rule.arguments:
        # Flask takes no name with a line break; the error has the shape of the API that the path is below.
        types[404] = []
    for status, kind in _outcomes(app, view, found):
        types.setdefault(status, []).extend(kind)
    responses = {}
    for status in sorted(types):
        names = ON_EVERY + (ON_WAIT if status in (429, 503) else ())
        if status == HTTPStatus.OK:
            names += ON_TOKENS if found.reads_tokens else ()
            names += ON_VECTORS if found.embeds else ()
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        }
        if types[status]:
            media = found.media if status in found.answers else (JSON,)
            schema = schemas.one_of(types[status])
            responses[str(status)]["content"] = {
                kind: {"schema": {"contentMediaType": kind} if kind == NPY else schema} for kind in media
            }
    return responses


def _outcomes(app: Flask, view: Callable[..., Any], found: Operation) -> Iterator[tuple[int, list[Any]]]:
    """Every status that the view can return, with the types that its body may have (empty for no body)."""
    for part_view, part in _variants(view, found):
        protocol = _protocol(app, part_view)
        for status, kind in part.answers.items():
            yield status, list(kind) if isinstance(kind, tuple) else [kind] if kind is not None else []
        for error in (*part.raises, *(() if part.public else (Unauthorized,))):
            # Some protocols answer differently if there is nothing to embed.
            for reason in ("", EMPTY) if error is InvalidRequest else ("",):
                _, status = protocol.render(Failure(error.status, error.error_type, reason))
                yield status, [protocol.error]


def _types(app: Flask, view: Callable[..., Any], found: Operation) -> list[Any]:
    bodies = [part.body.type for _, part in _variants(view, found) if part.body is not None]
    return bodies + [kind for _, types in _outcomes(app, view, found) for kind in types]


def _variants(view: Callable[..., Any], found: Operation) -> list[tuple[Callable[..., Any], Operation]]:
    """The operation, and that of another protocol on the same route, if any."""
    parts = [(view, found)]
    if found.variant is not None and (variant := operation_of(found.variant)) is not None:
        parts.append((found.variant, variant))
    return parts


def _protocol(app: Flask, view: Callable[..., Any]) -> ApiProtocol:
    """The protocol that renders the view's errors."""
    for endpoint, function in app.view_functions.items():
        if function is view:
            found = app.blueprints.get(endpoint.rpartition(".")[0])
            return found if isinstance(found, ApiProtocol) else native.protocol
    return native.protocol
