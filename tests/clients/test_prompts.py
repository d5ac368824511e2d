"""Prompts, on every protocol that has a word for them, with a model that has them; and its loading."""

import openai
import pytest
import requests
from huggingface_hub import InferenceClient

from tests.clients.conftest import PROMPTS
from tests.service import wait_until

TEXTS = ["what is the capital of France", "word " * 400]


def test_a_client_that_comes_too_early_is_told_when_to_return(prompted):
    """Runs first here: the service has only just been started."""
    url = f"{prompted.url}/v1/embeddings"

    def early():
        try:
            return requests.post(url, json={"input": "hello"}, timeout=10)
        except requests.ConnectionError:
            return None

    answer = wait_until(early, 30, "an answer")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert int(answer.headers["Retry-After"]) >= 1
    ready = requests.get(f"{prompted.url}/.well-known/ready", timeout=10)
    assert (ready.status_code, set(ready.json())) == (503, {"error"})
    with openai.OpenAI(base_url=f"{prompted.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            client.embeddings.create(input="hello", model="any")
    prompted.wait_ready()
    assert requests.get(f"{prompted.url}/info", timeout=10).json()["prompts"] == PROMPTS


@pytest.fixture
def check(prompted, prompted_oracle, close):
    """Asserts that vectors are those of TEXTS with the prompt."""
    prompted.wait_ready()

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
    answer = prompted.wait_ready().post("/embed", {"texts": "x", "prompt_name": "nonsense"})
    assert answer.status_code == 400
    assert "document, query, title" in answer.json()["error"]


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
