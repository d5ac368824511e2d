"""The OpenAPI document, generated from the routes and the structs that validate their requests."""

import json
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
from flask import Flask
from werkzeug.routing import Rule

from embedding_service import __version__
from embedding_service.errors import InvalidRequest, Unauthorized
from embedding_service.web.descriptions import EXAMPLES, FIELDS, HEADERS, TAGS
from embedding_service.web.protocol import EMPTY, ApiProtocol, Failure
from embedding_service.web.protocols import native
from embedding_service.web.responses import JSON, NPY
from embedding_service.web.route_spec import RouteSpec, spec_of

REFERENCE = "#/components/schemas/{name}"

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "azure": {"type": "apiKey", "in": "header", "name": "api-key"},
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password."},
}

_NAMES = tuple(HEADERS)
ON_EVERY, ON_WAIT, ON_TOKENS, ON_VECTORS = _NAMES[:1], _NAMES[1:3], _NAMES[3:6], _NAMES[6:]


Outcomes = dict[int, list[Any]]


class Route(NamedTuple):
    """A rule with its view, and the specs behind it: the view's own, and another protocol's, if any."""

    rule: Rule
    view: Any
    parts: list[tuple[ApiProtocol, RouteSpec]]

    @property
    def bodies(self) -> list[Any]:
        """The types of its request's body."""
        return [part.body.type for _, part in self.parts if part.body is not None]

    def outcomes(self) -> Outcomes:
        """Every status that it can return, with the types that its body may have (empty for no body)."""
        types: Outcomes = {405: []} if self.parts[0][1].public else {}
        if self.rule.arguments:
            # Flask takes no name with a line break; the error has the shape of the API above the path.
            types[404] = []
        for protocol, part in self.parts:
            for status, kind in part.answers.items():
                kinds = kind if isinstance(kind, tuple) else (kind,) if kind is not None else ()
                types.setdefault(status, []).extend(kinds)
            for error in (*part.errors(), *(() if part.public else (Unauthorized,))):
                # Some protocols answer differently if there is nothing to embed.
                for reason in ("", EMPTY) if error is InvalidRequest else ("",):
                    _, status = protocol.render(Failure(error.status, error.error_type, reason))
                    types.setdefault(status, []).append(protocol.error)
        return types


def document(app: Flask) -> dict[str, Any]:
    """The OpenAPI document, covering every route that has a spec."""
    # The service's own route comes first, since readers start there.
    routes = sorted(_routes(app), key=lambda route: route.rule.rule != "/embed")
    schemas = Schemas(
        kind for route in routes for kinds in (route.bodies, *route.outcomes().values()) for kind in kinds
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        rule = route.rule.rule
        methods = route.rule.methods or ()
        method = next(each for each in ("post", "delete", "get") if each.upper() in methods)
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)
        name = re.sub(r"\W+", "_", method + (rule if rule != "/" else "/root")).rstrip("_")
        paths.setdefault(path, {})[method] = {"operationId": name, **_operation(route, schemas)}
    titles = dict.fromkeys(one["tags"][0] for path in paths.values() for one in path.values())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Embedding service",
            "version": __version__,
            "description": "Text embeddings through several APIs, from one model and one queue.",
            "license": {"name": "MIT", "identifier": "MIT"},
            "contact": {"name": "The maintainers of the embedding service"},
        },
        "tags": [{"name": title, "description": TAGS[title]} for title in titles],
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


def _routes(app: Flask) -> Iterable[Route]:
    # A view that is served at another protocol's route too has the protocol of its first.
    protocols = {
        view: app.blueprints.get(endpoint.rpartition(".")[0])
        for endpoint, view in reversed(app.view_functions.items())
    }
    for rule in app.url_map.iter_rules():
        view: Any = app.view_functions[rule.endpoint]
        own = spec_of(view)
        if own is not None and own.described:
            views = [view] if own.variant is None else [view, own.variant]
            owners = [protocols[each] for each in views]
            parts = [
                (owner if isinstance(owner, ApiProtocol) else native.protocol, each.spec)
                for owner, each in zip(owners, views, strict=True)
            ]
            yield Route(rule, view, parts)


class Schemas:
    """JSON schemas of types; a named type becomes a reference to `components`."""

    def __init__(self, types: Iterable[Any]) -> None:
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


def _operation(route: Route, schemas: Schemas) -> dict[str, Any]:
    summary, _, description = (route.view.__doc__ or "").partition("\n")
    protocol, own = route.parts[0]
    described: dict[str, Any] = {
        "tags": [protocol.title],
        "summary": summary,
        "description": description.strip() or summary,
        "responses": _responses(own, route.outcomes(), schemas),
    }
    described["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in sorted(route.rule.arguments)
    ] + [
        {"name": name, "in": "query", "schema": {"type": "string", "enum": list(values)}}
        for name, values in own.query.items()
    ]
    if own.body is not None:
        content: dict[str, Any] = {"schema": schemas.one_of(route.bodies, "oneOf")}
        names = [kind.__name__ for kind in route.bodies]
        if examples := {name: {"value": EXAMPLES[name]} for name in names if name in EXAMPLES}:
            content["examples"] = examples
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    # Without keys in its settings, the service asks for none.
    described["security"] = [] if own.public else [{}, *({name: []} for name in SECURITY_SCHEMES)]
    return described


def _responses(own: RouteSpec, outcomes: Outcomes, schemas: Schemas) -> dict[str, dict[str, Any]]:
    responses = {}
    for status, types in sorted(outcomes.items()):
        names = ON_EVERY + (ON_WAIT if status in (429, 503) else ())
        if status == HTTPStatus.OK:
            names += ON_TOKENS if own.reads_tokens or own.embeds else ()
            names += ON_VECTORS if own.embeds else ()
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        }
        if types:
            media = own.media if status in own.answers else (JSON,)
            schema = schemas.one_of(types)
            responses[str(status)]["content"] = {
                kind: {"schema": {"contentMediaType": kind} if kind == NPY else schema} for kind in media
            }
    return responses
