"""`embedding-service verify` beside this service, other servers, and stand-ins that each make one mistake."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import requests
from flask import Flask, jsonify, request
from sentence_transformers import SentenceTransformer
from werkzeug.serving import make_server

from embedding_service.verify import command
from embedding_service.verify.oracle import unit
from tests.inference.tiny_models import build
from tests.service import ROOT

INFINITY = ROOT / "build" / "infinity-venv" / "bin" / "infinity_emb"
Encode = Callable[[list[str]], np.ndarray]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small model, whose mistakes are quick to compute."""
    return str(build("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def tiny(model) -> SentenceTransformer:
    return SentenceTransformer(model, device="cpu")


def verify(capsys, url: str, model: str, *options: str) -> tuple[int, dict]:
    code = command.execute(["--url", url, "--model", model, "--json", *options])
    return code, json.loads(capsys.readouterr().out)


# How a stand-in speaks: its route, its field for texts, and its answer with vectors.
SPOKEN = {
    "OpenAI": (
        "/v1/embeddings",
        "input",
        # In another order than the texts, which `index` allows.
        lambda vectors: {"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)][::-1]},
    ),
    "Ollama": ("/api/embed", "input", lambda vectors: {"model": "any", "embeddings": vectors}),
    "Cohere": ("/v2/embed", "texts", lambda vectors: {"id": "any", "embeddings": {"float": vectors}}),
}


@pytest.fixture
def stand_in() -> Iterator[Callable[..., str]]:
    """Serve a function on the route of an API; returns the URL."""
    running = []

    def serve(encode: Encode, api: str = "OpenAI") -> str:
        path, field, answer = SPOKEN[api]
        app = Flask("stand-in")
        lock = threading.Lock()

        @app.post(path)
        def embed():
            with lock:
                vectors = encode(request.get_json()[field])
            return jsonify(answer([vector.tolist() for vector in vectors]))

        server = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def unnormalised(model: SentenceTransformer) -> Encode:
    return lambda texts: 3 * model.encode(texts)


def cut(model: SentenceTransformer) -> Encode:
    def encode(texts):
        own, model.max_seq_length = model.max_seq_length, 32
        try:
            return model.encode(texts)
        finally:
            model.max_seq_length = own

    return encode


def pooled(model: SentenceTransformer) -> Encode:
    return lambda texts: unit(
        np.stack([each[0].numpy() for each in model.encode(texts, output_value="token_embeddings")])
    )


def by_batch(model: SentenceTransformer) -> Encode:
    def encode(texts):
        vectors = model.encode(texts)
        return unit(vectors + 0.1 * (len(texts) > 1) * vectors.mean(0))

    return encode


def no_special_tokens(model: SentenceTransformer) -> Encode:
    def encode(texts):
        ids = [
            model.tokenizer(text, truncation=True, max_length=model.max_seq_length)["input_ids"]
            for text in texts
        ]
        # A text without any tokens keeps them, since there is nothing else to pool.
        features = model.tokenizer.pad(
            {"input_ids": [each[1:-1] or each for each in ids]}, return_tensors="pt"
        )
        return model(dict(features))["sentence_embedding"].detach().numpy()

    return encode


def imprecise(model: SentenceTransformer) -> Encode:
    return lambda texts: unit(np.round(model.encode(texts) * 64) / 64)


def disordered(model: SentenceTransformer) -> Encode:
    return lambda texts: model.encode(texts)[::-1]


def negated(model: SentenceTransformer) -> Encode:
    return lambda texts: np.roll(model.encode(texts), 5, axis=1)


def shorter(model: SentenceTransformer) -> Encode:
    return lambda texts: model.encode(texts)[:, :16]


def varied(model: SentenceTransformer) -> Encode:
    return lambda texts: model.encode(texts)[:, : 32 - len(texts[0]) % 2]


MISTAKES = {
    unnormalised: "vectors are not normalised",
    cut: "texts are cut at 32 tokens, not at 48",
    pooled: "another pooling: the first token's vector",
    by_batch: "the vector of a text depends on its batch",
    no_special_tokens: "special tokens differ: none are added",
    imprecise: "lower precision",
    disordered: "the vectors are in another order than the texts",
    negated: "another model",
    shorter: "another model: 16 dimensions, not 32",
}
# Each mistake is made in one API at every run, and at night in the others.
EACH = [
    pytest.param(mistake, api, marks=[pytest.mark.nightly] if (number + shift) % 3 else [])
    for number, mistake in enumerate(MISTAKES)
    for shift, api in enumerate(SPOKEN)
]


@pytest.mark.parametrize(("mistake", "api"), EACH, ids=lambda given: getattr(given, "__name__", given))
def test_each_mistake_is_named(capsys, stand_in, model, tiny, mistake, api):
    code, report = verify(capsys, stand_in(mistake(tiny), api), model)
    assert code == 3 and not report["same"]
    assert (report["findings"], report["api"]) == ([MISTAKES[mistake]], api)


def test_a_number_of_dimensions_that_varies_is_named(capsys, stand_in, model, tiny):
    code, report = verify(capsys, stand_in(varied(tiny)), model)
    assert code == 3 and "the number of dimensions varies" in report["findings"]


def test_an_option_that_alone_is_wrong_is_named(capsys, model, tiny):
    """As infinity does, which shortens vectors without normalising them again."""
    app = Flask("stand-in")

    @app.post("/api/embed")
    def embed():
        body = request.get_json()
        return jsonify(embeddings=tiny.encode(body["input"])[:, : body.get("dimensions")].tolist())

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        code, report = verify(capsys, f"127.0.0.1:{server.server_port}", model)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (code, report["findings"]) == (3, ["with dimensions: vectors are not normalised"])


def test_the_same_vectors_pass(capsys, stand_in, model, tiny):
    code, report = verify(capsys, stand_in(tiny.encode), model)
    assert (code, report["same"], report["findings"], report["api"]) == (0, True, [], "OpenAI")
    probes = {probe["name"]: probe for probe in report["probes"]}
    assert probes["dimensions"]["refused"] == "ignored"
    assert len(probes) == len(report["probes"]) >= 14


def test_this_service_passes(capsys, service, model_folder):
    code, report = verify(capsys, service.url, str(model_folder), "--tolerance", "1e-5")
    assert (code, report["findings"], report["api"]) == (0, [], "the native API")
    assert not [probe for probe in report["probes"] if "refused" in probe]


def test_a_plain_flask_view_passes(capsys, start, model):
    command_line = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:{port}", "--chdir", "benchmarks"]
    command_line += ["-c", "/dev/null", "--threads", "4", "baseline_flask:app"]
    plain = start(command_line, EMBEDDING_MODEL=model).wait_ready()
    code, report = verify(capsys, plain.url, model)
    assert (code, report["findings"]) == (0, [])


@pytest.mark.skipif(
    not INFINITY.exists(), reason="infinity is not installed; `make bench-infinity` does that"
)
def test_infinity_shortens_vectors_without_normalising_them(capsys, start, model_folder):
    command_line = [
        str(INFINITY),
        "v2",
        "--model-id",
        str(model_folder),
        "--engine",
        "torch",
        "--device",
        "cpu",
    ]
    command_line += ["--host", "127.0.0.1", "--port", "{port}", "--log-level", "warning"]
    peer = start(command_line, HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", PATH=os.environ["PATH"])
    assert peer.wait_ready(120)
    code, report = verify(capsys, peer.url, str(model_folder))
    assert (code, report["api"]) == (3, "OpenAI")
    assert report["findings"] == ["with dimensions: vectors are not normalised"]


def test_what_cannot_be_compared_exits_with_2(capsys, stand_in, model):
    assert command.execute(["--url", "http://127.0.0.1:1", "--model", model]) == 2
    assert "does not answer" in capsys.readouterr().err
    url = stand_in(lambda texts: np.zeros((len(texts) + 1, 3)))
    assert command.execute(["--url", url, "--model", model]) == 2
    assert "no known API of embeddings answers" in capsys.readouterr().err


def test_the_report_has_a_line_for_each_probe(capsys, stand_in, model, tiny):
    assert command.execute(["--url", stand_in(cut(tiny)), "--model", model]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The vectors differ: texts are cut at 32 tokens, not at 48"
    assert any(line.startswith("over-long ") and line.endswith("not at 48") for line in lines)
    # Short texts are not cut: their line has numbers and no finding.
    name, texts, difference, cosine = next(line for line in lines if line.startswith("case ")).split()
    assert (name, texts) == ("case", "5") and float(difference) < 1e-5 and float(cosine) > 0.99999


def test_a_key_is_sent(model):
    seen = []
    app = Flask("keyed")

    @app.route("/<path:path>", methods=["GET", "POST"])
    def refuse(path):
        seen.append(request.headers.get("Authorization"))
        return jsonify(error="no"), 401

    server = make_server("127.0.0.1", 0, app)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert command.execute(["--url", url, "--model", model, "--key", "secret"]) == 2
        assert requests.get(url, timeout=60).status_code == 404
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert set(seen) == {"Bearer secret"}
