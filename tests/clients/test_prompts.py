"""Prompts, on every protocol that has a word for them, with a model that has them."""

import openai
import pytest
import requests
from huggingface_hub import InferenceClient

from tests.clients.conftest import PROMPTS

TEXTS = ["what is the capital of France", "word " * 400]


@pytest.fixture
def check(prompted_oracle, close):
    """Asserts that vectors are those of TEXTS with the prompt."""

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


def test_info_tells_the_prompts(prompted):
    assert requests.get(f"{prompted.url}/info", timeout=10).json()["prompts"] == PROMPTS


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
