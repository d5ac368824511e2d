"""Prompts, in every protocol that has a field for them, with a model that has some."""

import openai
import pytest
import requests
from huggingface_hub import InferenceClient

from tests.clients.conftest import PROMPTS

TEXTS = ["what is the capital of France", "word " * 400]


@pytest.fixture
def check(prompted_oracle, close):
    """Assert that vectors are those of TEXTS with the prompt."""

    def check(vectors, prompt_name) -> None:
        close(vectors, TEXTS, prompted_oracle, prompt_name=prompt_name)

    return check


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        ({}, None),
        ({"prompt_name": "title"}, "title"),
        ({"input_type": "query"}, "query"),
        ({"input_type": "document"}, "document"),
    ],
    ids=str,
)
def test_native(prompted, check, arguments, prompt):
    check(prompted.post("/embed", {"texts": TEXTS, **arguments}).json()["embeddings"], prompt)


def test_an_unknown_prompt_is_refused(prompted):
    answer = prompted.post("/embed", {"texts": "x", "prompt_name": "nonsense"})
    assert answer.status_code == 400
    assert "document, query, title" in answer.json()["error"]


def test_info_lists_the_prompts(prompted):
    assert requests.get(f"{prompted.url}/info", timeout=60).json()["prompts"] == PROMPTS


def test_openai(prompted, check):
    with openai.OpenAI(base_url=f"{prompted.url}/v1", api_key="none") as client:
        for kind in ("query", "document"):
            answer = client.embeddings.create(input=TEXTS, model="any", extra_body={"input_type": kind})
            check([item.embedding for item in answer.data], kind)


def test_text_embeddings_inference(prompted, check):
    client = InferenceClient(prompted.url, token="none")
    check(client.feature_extraction(TEXTS, prompt_name="title"), "title")


def test_weaviate(prompted, check):
    for task, prompt in {"query": "query", "passage": "document"}.items():
        answer = prompted.post("/vectors", {"texts": TEXTS, "config": {"task_type": task}})
        check(answer.json()["vectors"], prompt)


def ask(service, **fields):
    return requests.post(f"{service.url}/embed", json={"texts": TEXTS} | fields, timeout=60)


@pytest.mark.parametrize(
    ("path", "field", "vectors"),
    [
        ("embed", "texts", lambda body: body["embeddings"]),
        ("v1/embeddings", "input", lambda body: [row["embedding"] for row in body["data"]]),
        ("embed", "inputs", lambda body: body),
    ],
    ids=["native", "OpenAI", "TEI"],
)
def test_a_prompt_as_free_text(service, oracle, close, path, field, vectors):
    body = {field: TEXTS, "prompt": "find this: "}
    answer = requests.post(f"{service.url}/{path}", json=body, timeout=60)
    close(vectors(answer.json()), TEXTS, oracle, prompt="find this: ")


def test_a_free_prompt_with_a_prompt_name_is_rejected(service):
    answer = ask(service, prompt="a", prompt_name="query")
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "prompt cannot be sent together with prompt_name",
    )


@pytest.mark.parametrize(
    ("path", "field", "status"),
    [("embed", "texts", 400), ("v1/embeddings", "input", 400), ("embed", "inputs", 422)],
    ids=["native", "OpenAI", "TEI"],
)
def test_a_prompt_far_too_long_is_refused(service, path, field, status):
    body = {field: ["a"] * 4000, "prompt": "x" * 10_001}
    answer = requests.post(f"{service.url}/{path}", json=body, timeout=60)
    assert answer.status_code == status
    assert "prompt must be a string of at most 10000 characters" in answer.text


@pytest.mark.parametrize("overflow", ["mean", "chunks"])
def test_a_prompt_that_leaves_no_room_for_pieces_is_refused(service, overflow):
    answer = ask(service, prompt="word " * 400, overflow=overflow)
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "the prompt leaves no room for a text in the 256 tokens that the model reads",
    )


def test_prompts_from_the_settings(start, service, oracle, close):
    settings = {"PROMPTS": '{"mine": "my text: ", "query": "q: "}', "DEFAULT_PROMPT_NAME": "mine"}
    prompted = start(**settings).wait_ready()
    info = requests.get(f"{prompted.url}/info", timeout=60).json()
    assert (info["prompts"]["mine"], info["prompts"]["query"]) == ("my text: ", "q: ")
    assert info["default_prompt_name"] == "mine"
    assert info["fingerprint"] != requests.get(f"{service.url}/info", timeout=60).json()["fingerprint"]
    for fields, prompt in (
        ({}, "my text: "),
        ({"prompt_name": "query"}, "q: "),
        ({"input_type": "query"}, "q: "),
        ({"prompt": ""}, ""),
    ):
        close(ask(prompted, **fields).json()["embeddings"], TEXTS, oracle, prompt=prompt)


def test_an_unknown_default_prompt_stops_the_start(start):
    service = start(DEFAULT_PROMPT_NAME="nope")
    assert service.process.wait(120) == 78
    assert "DEFAULT_PROMPT_NAME='nope' is not a prompt; there are: " in service.log()


def test_the_served_name_is_shown_and_its_aliases_are_accepted(start_without_model):
    service = start_without_model(SERVED_MODEL_NAME="my-model, alias").wait_ready()
    assert ask(service).json()["model"] == "my-model"
    assert service.health()[1]["model"] == "my-model"
    assert requests.get(f"{service.url}/info", timeout=60).json()["model_name"] == "my-model"
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["my-model"]
    assert client.models.retrieve("alias").id == "my-model"
    names = [one["name"] for one in requests.get(f"{service.url}/api/tags", timeout=60).json()["models"]]
    assert names[:2] == ["my-model:latest", "alias:latest"]
