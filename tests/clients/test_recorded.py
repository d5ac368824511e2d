"""Requests as released clients send them, recorded, and what these clients read in the answer.

A template has a type for a value that a strict client decodes, or the value itself; an Ellipsis stands for
any value, and a list with one item describes every item.
"""

import http.client
import json
import re
from typing import Any

import pytest

JSON = {"Content-Type": "application/json"}
HELLO = '"hello"'
VECTOR = [float]

# Ollama's own types, as ollama-rs, ollama-rest, ollama4j and Spring AI decode them.
DETAILS = {
    "parent_model": "",
    "format": str,
    "family": "bert",
    "families": ["bert"],
    "parameter_size": "22.7M",
    "quantization_level": str,
}
LISTED = {"name": str, "model": str, "modified_at": str, "size": int, "digest": str, "details": DETAILS}
OPENAI = {
    "id": str,
    "object": "list",
    "model": str,
    "data": [{"object": "embedding", "index": int, "embedding": VECTOR}],
    "usage": {"prompt_tokens": 3, "total_tokens": 3},
}
OPENAI_ERROR = {"error": {"message": str, "type": str, "param": ..., "code": ...}}
MODEL = {"id": str, "object": "model", "created": int, "owned_by": str}
COHERE = {
    "id": str,
    "texts": ["hello"],
    "embeddings": [VECTOR],
    "meta": {"api_version": {"version": "1"}, "billed_units": {"input_tokens": 3}},
    "response_type": "embeddings_floats",
}

# client, request line, headers, body, status, template
RECORDED: list[tuple[str, str, dict[str, str], str, int, Any]] = [
    ("ollama-rs list", "GET /api/tags", {"Accept": "*/*"}, "", 200, {"models": [LISTED]}),
    (
        *("ollama-rest ps", "GET /api/ps", {}, "", 200),
        {"models": [{**LISTED, "expires_at": str, "size_vram": int, "context_length": 256}]},
    ),
    (
        *("ollama-rs show", "POST /api/show", JSON, '{"model":"all-minilm:latest"}', 200),
        {
            **{"license": str, "modelfile": str, "parameters": str, "template": str, "modified_at": str},
            **{"details": DETAILS, "capabilities": ["embedding"]},
            "model_info": {
                "general.architecture": "bert",
                "general.parameter_count": 22713216,
                "bert.context_length": 256,
                "bert.embedding_length": 384,
            },
        },
    ),
    (
        "Ollama pull",
        "POST /api/pull",
        {**JSON, "Accept": "application/x-ndjson"},
        *('{"model":"all-minilm"}', 200, '{"status":"pulling manifest"}\n{"status":"success"}\n'),
    ),
    (
        *("Spring AI pull", "POST /api/pull", JSON),
        *('{"model":"all-minilm:22m","insecure":false,"stream":false}', 200, {"status": "success"}),
    ),
    (
        *("pull of another model", "POST /api/pull", JSON, '{"model":"mistral"}', 404),
        {"error": re.compile("all-minilm:latest")},
    ),
    ("Ollama delete", "DELETE /api/delete", JSON, '{"model":"all-minilm"}', 200, ""),
    (
        *("Ollama unload", "POST /api/generate", JSON, '{"model":"all-minilm","keep_alive":0}', 200),
        {"model": "all-minilm", "created_at": str, "response": "", "done": True, "done_reason": "unload"},
    ),
    (
        *("Ollama generate", "POST /api/generate", JSON, '{"model":"a","prompt":"Why?"}', 404),
        {"error": re.compile("embeds texts and generates none")},
    ),
    (
        *("Ollama input", "POST /api/embeddings", JSON, '{"model":"a","input":"hello"}', 400),
        {"error": "input is not a field here; use prompt"},
    ),
    (
        *("Ollama prompt", "POST /api/embed", JSON, '{"model":"a","prompt":"hello"}', 400),
        {"error": "prompt is not a field here; use input"},
    ),
    (
        *("Ollama Go", "POST /api/embed", {**JSON, "Accept": "application/x-ndjson"}),
        *('{"model":"all-minilm","input":["hello"],"options":{},"dimensions":0}', 200),
        {
            **{"model": str, "embeddings": [VECTOR], "prompt_eval_count": 3},
            **{"total_duration": int, "load_duration": int},
        },
    ),
    (
        *("num_ctx that fits", "POST /api/embed", JSON),
        *('{"model":"a","input":"hello","options":{"num_ctx":64}}', 200, {"embeddings": [VECTOR]}),
    ),
    (
        *("num_ctx that does not fit", "POST /api/embed", JSON),
        '{"model":"a","input":"' + "word " * 100 + '","options":{"num_ctx":64}}',
        *(400, {"error": "options.num_ctx must be at least 102 for these texts, or left out"}),
    ),
    (
        *("Cognee", "POST /api/embed", JSON),
        '{"model":"a","input":"' + "word " * 400 + '","truncate":false}',
        *(400, {"error": re.compile("the input length exceeds the context length")}),
    ),
    ("Ollama version", "GET /api/version", {}, "", 200, {"version": re.compile(r"0\.\d+\.\d+")}),
    (
        *("open-webui", "POST /api/embed", JSON, '{"input":["hello"],"model":"a","prefix":"query: "}', 400),
        {"error": "prefix is not supported here, and would change the vectors"},
    ),
    (
        *("open-webui openai", "POST /v1/embeddings", JSON, '{"input":["a"],"model":"a","prefix":"q: "}'),
        *(400, {"error": {"message": "prefix is not a field here; use prompt"}}),
    ),
    (
        *("Mistral", "POST /v1/embeddings", {**JSON, "Accept": "application/json"}),
        *('{"model":"mistral-embed","input":["hello"],"output_dtype":"float"}', 200, OPENAI),
    ),
    (
        *("Jina, Chroma", "POST /v1/embeddings", {**JSON, "Accept-Encoding": "identity"}),
        '{"input":["hello"],"model":"jina-embeddings-v3","late_chunking":false,"truncate":false,'
        '"normalized":true,"embedding_type":"float"}',
        *(200, OPENAI),
    ),
    (
        *("Jina unnormalised", "POST /v1/embeddings", JSON, '{"input":["hello"],"normalized":false}', 200),
        OPENAI,
    ),
    *(
        (
            f"NVIDIA {truncate} {kind}",
            *("POST /v1/embeddings", JSON),
            '{"input":["hello"],"model":"nvidia/nv-embedqa-e5-v5","encoding_format":"float",'
            f'"input_type":"{kind}","truncate":"{truncate}"}}',
            *(200, OPENAI),
        )
        for truncate, kind in (("NONE", "passage"), ("START", "query"), ("END", "passage"))
    ),
    (
        *("azure-ai-inference", "POST /v1/embeddings?api-version=2024-05-01-preview"),
        {**JSON, "api-key": "none", "extra-parameters": "pass-through"},
        *('{"input":["hello"],"input_type":"text","encoding_format":"float"}', 200, OPENAI),
    ),
    (
        *("vLLM", "POST /v1/embeddings", JSON),
        *('{"input":"hello","model":"a","truncate_prompt_tokens":-1,"priority":0}', 200, OPENAI),
    ),
    (
        *("vLLM cut", "POST /v1/embeddings", JSON, '{"input":"hello","truncate_prompt_tokens":100}', 400),
        {"error": {"param": "truncate_prompt_tokens"}},
    ),
    ("a float", "POST /v1/embeddings", JSON, '{"input":"hello","dimensions":384.0}', 200, OPENAI),
    (
        *("too many dimensions", "POST /v1/embeddings", JSON, '{"input":"hello","output_dimension":1536}'),
        *(400, {"error": {"param": "output_dimension", "message": re.compile("^output_dimension ")}}),
    ),
    (
        *("texts", "POST /v1/embeddings", JSON, '{"texts":["hello"]}', 400),
        {"error": {"message": "texts is not a field here; use input"}},
    ),
    ("models.retrieve", "GET /v1/models/text-embedding-3-small", {}, "", 200, MODEL),
    (
        *("cohere models", "GET /v1/models?endpoint=embed", {}, "", 200),
        {"object": "list", "data": [MODEL], "models": [{"name": str, "endpoints": ["embed"]}]},
    ),
    ("models without /v1", "GET /models", {}, "", 200, {"object": "list", "data": [MODEL]}),
    ("GET /v1", "GET /v1", {}, "", 200, {"data": [MODEL]}),
    ("HEAD /v1", "HEAD /v1", {}, "", 200, ""),
    (
        *("LM Studio", "GET /api/v0/models", {}, "", 200),
        {"data": [{"id": str, "type": "embeddings", "state": "loaded", "max_context_length": 256}]},
    ),
    (
        "Azure",
        "POST /openai/deployments/text-embedding-3-small/embeddings?api-version=2024-02-01",
        {**JSON, "api-key": "none"},
        *('{"input":["hello"],"model":"text-embedding-3-small","encoding_format":"float"}', 200, OPENAI),
    ),
    *(
        (path, f"POST {path}", JSON, '{"inputs":["hello"],"options":{"wait_for_model":true}}', 200, [VECTOR])
        for path in (
            "/models/sentence-transformers/all-MiniLM-L6-v2",
            "/pipeline/feature-extraction/sentence-transformers/all-MiniLM-L6-v2",
        )
    ),
    (
        *("litellm cohere/", "POST /", {**JSON, "Request-Source": "unspecified:litellm"}),
        *('{"model":"embed-english-v3.0","texts":["hello"],"input_type":"search_document"}', 200, COHERE),
    ),
    (
        *("cohere tokenize", "POST /v1/tokenize", JSON, '{"text":"hello world","model":"command"}', 200),
        {"tokens": [int], "token_strings": ["hello", "world"], "meta": {"api_version": {"version": "1"}}},
    ),
    ("cohere check-api-key", "POST /v1/check-api-key", JSON, "{}", 200, {"valid": True}),
    (
        *("cohere image", "POST /v2/embed", JSON, '{"input_type":"image","texts":["hello"]}', 400),
        {"id": str, "message": 'input_type is "image"; the model reads text'},
    ),
    *(
        (f"{line} is not here", line, JSON, "{}", 404, template)
        for line, template in {
            "POST /rerank": {"error": re.compile("POST /similarity"), "error_type": str},
            "POST /v1/rerank": OPENAI_ERROR,
            "POST /v2/rerank": {"message": re.compile("POST /similarity")},
            "POST /v1/chat/completions": OPENAI_ERROR,
            "POST /api/chat": {"error": re.compile("generates none")},
            "POST /embed_sparse": {"error": re.compile("POST /embed returns"), "error_type": str},
            "POST /v1/v1/embeddings": {"error": {"message": re.compile("/v1 twice")}},
            "POST /v1/embedings": {"error": {"message": re.compile("perhaps /v1/embeddings")}},
        }.items()
    ),
    (
        "too many texts",
        "POST /api/embed",
        JSON,
        json.dumps({"input": ["a"] * 4097}),
        *(413, {"error": re.compile(r"input has 4097 texts.*\(MAX_TEXTS_PER_REQUEST\)")}),
    ),
]


def matches(value: Any, template: Any) -> bool:
    """Whether a strict client that expects the template could decode the value."""
    if isinstance(template, dict):
        return isinstance(value, dict) and all(
            name in value and matches(value[name], inner) for name, inner in template.items()
        )
    if isinstance(template, list) and len(template) == 1:
        return isinstance(value, list) and bool(value) and all(matches(each, template[0]) for each in value)
    if isinstance(template, re.Pattern):
        return isinstance(value, str) and template.search(value) is not None
    if isinstance(template, type):
        return type(value) is template
    return template is ... or value == template


def send(service, line: str, headers: dict[str, str], body: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        method, path = line.split(" ")
        connection.request(method, path, body.encode() or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("line", "headers", "body", "status", "template"),
    [row[1:] for row in RECORDED],
    ids=[row[0] for row in RECORDED],
)
def test_a_recorded_request_gets_what_its_client_reads(service, line, headers, body, status, template):
    got, text, _ = send(service, line, headers, body)
    assert got == status, text
    if isinstance(template, str):
        assert text == template
    else:
        assert matches(json.loads(text), template), text


def test_every_name_is_listed_with_a_tag_and_can_be_pulled(service):
    names = [each["name"] for each in json.loads(send(service, "GET /api/tags", {}, "")[1])["models"]]
    assert names == [
        "sentence-transformers/all-MiniLM-L6-v2:latest",
        *("all-minilm:latest", "all-minilm:l6-v2", "all-minilm:22m", "all-minilm-l6-v2:latest", "any:latest"),
    ]
    for name in (*names, "all-minilm", "any"):
        assert send(service, "POST /api/pull", JSON, json.dumps({"model": name}))[0] == 200, name


LONG = "word " * 400
# Bodies with an over-long text, and the fields by which the caller refuses to have it cut.
REFUSALS = [
    ("/embed", {"texts": LONG}, {"truncate": False}),
    ("/embed", {"texts": LONG}, {"overflow": "error"}),
    ("/embed", {"texts": LONG}, {"overflow": "error", "truncate": False}),
    ("/", {"inputs": LONG}, {"truncate": False}),
    ("/", {"inputs": LONG}, {"overflow": "error"}),
    ("/v1/embeddings", {"input": LONG}, {"truncation": False}),
    ("/v1/embeddings", {"input": LONG}, {"truncate": "NONE"}),
    ("/v1/embeddings", {"input": LONG}, {"overflow": "error"}),
    ("/v2/embed", {"texts": [LONG]}, {"truncate": "NONE"}),
    ("/v1/embed", {"texts": [LONG]}, {"overflow": "error"}),
    ("/api/embed", {"input": LONG}, {"truncate": False}),
    ("/api/embeddings", {"prompt": LONG}, {"truncate": False}),
]


@pytest.mark.parametrize(("path", "body", "refusal"), REFUSALS, ids=str)
def test_advice_followed_literally_succeeds(service, path, body, refusal):
    status, text, _ = send(service, f"POST {path}", JSON, json.dumps(body | refusal))
    assert status in (400, 422)
    fields = advice(json.loads(text))
    assert fields.keys() == refusal.keys()
    assert send(service, f"POST {path}", JSON, json.dumps(body | refusal | fields))[0] == 200


def test_advice_of_a_service_that_refuses_by_default(start_without_model):
    service = start_without_model(DEFAULT_OVERFLOW="error").wait_ready()
    bodies = {json.dumps(body): path for path, body, _ in REFUSALS}
    bodies[json.dumps({"text": LONG})] = "/vectors"
    for body, path in bodies.items():
        status, text, _ = send(service, f"POST {path}", JSON, body)
        assert status in (400, 422), (path, text)
        followed = json.dumps(json.loads(body) | advice(json.loads(text)))
        assert send(service, f"POST {path}", JSON, followed)[0] == 200, path


def advice(error: dict[str, Any]) -> dict[str, Any]:
    """The fields that the error of any API says to send."""
    found = error.get("message") or error["error"]
    message = found if isinstance(found, str) else found["message"]
    fields: dict[str, Any] = json.loads(
        "{" + message.partition("; send ")[2].removesuffix(" to cut it").replace(" and ", ", ") + "}"
    )
    return fields


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/x-npy", "application/x-npy"),
        ("APPLICATION/X-NPY", "application/x-npy"),
        ("application/x-npy, application/json;q=0.5", "application/x-npy"),
        ("application/json, application/x-npy;q=0.5", "application/json"),
        ("application/x-npy;q=0", "application/json"),
        ("application/x-npy, */*;q=0.1", "application/x-npy"),
        ("*/*", "application/json"),
    ],
)
def test_the_format_is_what_accept_prefers(service, accept, kind):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", "/embed", b'{"texts": "hello"}', {**JSON, "Accept": accept})
    assert connection.getresponse().headers["Content-Type"] == kind
    connection.close()
