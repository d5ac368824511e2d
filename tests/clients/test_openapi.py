"""The OpenAPI document is complete, holds under fuzzing, and is shown without another host."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import requests

from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app
from tests.conftest import require_browser

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
]

# The files of the pages.
UNDESCRIBED = {"/docs/<name>", "/static/<version>/<path:name>"}


@pytest.mark.process
def test_no_request_gets_an_undocumented_response(service, tmp_path):
    """schemathesis sends requests that the document allows, and others."""
    run = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            *("run", f"{service.url}/openapi.json", "--checks", ",".join(CHECKS), "--no-color"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--seed", "1"),
            *("--generation-database", "none", "--request-timeout", "120"),
        ],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in service.log()
    assert service.health()[0] == 200


def test_every_route_is_described():
    app = create_app(None, Config())
    described = app.test_client().get("/openapi.json").get_json()["paths"]
    rules = {rule.rule for rule in app.url_map.iter_rules()} - UNDESCRIBED
    assert {rule.replace("<path:name>", "{name}") for rule in rules} == set(described)
    assert set(described["/"]) == {"get", "post"}


def test_the_document_is_built_from_the_structs(service):
    from embedding_service.web.protocols.native import EmbedBody

    described = requests.get(f"{service.url}/openapi.json", timeout=60).json()
    assert described["openapi"].startswith("3.1")
    schema = described["components"]["schemas"]["EmbedBody"]
    assert set(schema["properties"]) == set(EmbedBody.__struct_fields__)
    assert schema["required"] == ["texts"]
    for name, body in described["components"]["schemas"].items():
        jsonschema_rs.meta.validate(body), name


def bodies(described):
    """Every documented request body: route, example and its name."""
    for path, operations in described["paths"].items():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for name, example in content.get("examples", {}).items():
                yield path, name, example["value"]


def test_every_example_is_answered_as_it_stands(service):
    described = requests.get(f"{service.url}/openapi.json", timeout=60).json()
    found = list(bodies(described))
    schemas = {name for name in described["components"]["schemas"] if name.endswith("Body")}
    # Routes about a model need only its name, or nothing.
    assert schemas - {name for _, name, _ in found} <= {"OllamaNameBody"}
    for path, name, example in found:
        answer = service.post(path, example)
        assert answer.status_code == 200, (path, name, answer.text)


def test_generators_of_clients_get_types_that_demand_no_more_than_the_service():
    app = create_app(None, Config())
    described = app.test_client().get("/openapi.json").get_json()
    schemas = described["components"]["schemas"]
    fields = [field for schema in schemas.values() for field in schema.get("properties", {}).values()]
    assert not [field for field in fields if "default" in field]
    # Two bodies on one route are alternatives, and so are two kinds of arrays.
    assert (
        "oneOf"
        in described["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    )
    inputs = schemas["OpenAIEmbedBody"]["properties"]["input"]["anyOf"]
    assert not [kind for kind in inputs if "anyOf" in kind.get("items", {})]
    answer = described["paths"]["/embed"]["post"]["responses"]["200"]["content"]
    assert answer["application/x-npy"]["schema"] == {"contentMediaType": "application/x-npy"}
    operations = [one for path in described["paths"].values() for one in path.values()]
    names = [one["operationId"] for one in operations]
    assert len(set(names)) == len(names) and not {"get", "post"} & set(names)
    assert all("security" in one and one["description"] for one in operations)
    assert described["paths"]["/health"]["get"]["security"] == []
    assert all(tag["description"] != tag["name"] for tag in described["tags"])


@pytest.mark.process
def test_swagger_ui_renders_it_without_another_host(service, tmp_path):
    """Chromium, which can resolve only our name, logs what the page requests."""
    chromium = require_browser()
    log = tmp_path / "net.json"
    # A host name, since Swagger UI behaves differently for localhost.
    origin = service.url.replace("127.0.0.1", "service.example")
    page = subprocess.run(
        [
            chromium,
            *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--no-first-run", "--disable-background-networking", f"--log-net-log={log}"),
            "--host-resolver-rules=MAP service.example 127.0.0.1, MAP * ~NOTFOUND",
            *("--virtual-time-budget=20000", "--dump-dom", f"{origin}/docs"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    answer = requests.get(f"{service.url}/docs", timeout=60)
    assert "default-src 'none'; script-src 'self';" in answer.headers["Content-Security-Policy"]
    for shown in ("/v1/embeddings", "/api/embed", "Text Embeddings Inference", "Weaviate"):
        assert shown in page
    events = json.loads(log.read_text())["events"]
    requested = [event["params"] for event in events if "url" in event.get("params", {})]
    # The browser's own requests have no initiator; the page's have its origin.
    by_page = {urlsplit(each["url"]) for each in requested if each.get("initiator") == origin}
    assert {url.netloc for url in by_page if url.scheme != "data"} == {urlsplit(origin).netloc}
    paths = {url.path for url in by_page}
    assert {"/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json"} <= paths


@pytest.mark.parametrize("name", ["../flask_swagger_ui.py", "index.css", "%2e%2e%2fLICENSE"])
def test_only_the_files_of_the_page_are_served(service, name):
    answer = requests.get(f"{service.url}/docs/{name}", timeout=60)
    assert answer.status_code == 404
