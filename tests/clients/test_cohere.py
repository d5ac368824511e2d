"""Cohere's own SDK against the real service."""

import base64

import cohere
import httpx
import numpy as np
import pytest
import requests
from sentence_transformers.util import quantize_embeddings

from tests.clients.conftest import TEXTS


@pytest.fixture(scope="module")
def connect():
    """Makes clients of either version of the API."""
    with httpx.Client(timeout=60) as http:
        yield lambda kind, service: kind(api_key="none", base_url=service.url, httpx_client=http)


@pytest.fixture(scope="module")
def client(service, connect):
    return connect(cohere.ClientV2, service)


def embed(client, texts=TEXTS, **arguments):
    return client.embed(model="any", texts=texts, **{"input_type": "search_document"} | arguments)


def test_version_2_gives_floats_by_default(client, close):
    answer = embed(client)
    close(answer.embeddings.float_, TEXTS)
    assert answer.texts == TEXTS
    assert answer.meta.billed_units.input_tokens > len(TEXTS)


def test_several_number_formats_in_one_answer(client):
    answer = embed(client, embedding_types=["float", "binary", "ubinary", "base64"])
    floats = np.array(answer.embeddings.float_, np.float32)
    for name in ("binary", "ubinary"):
        expected = quantize_embeddings(floats, precision=name)
        assert getattr(answer.embeddings, name) == expected.tolist()
    decoded = [np.frombuffer(base64.b64decode(one), "<f4") for one in answer.embeddings.base64]
    assert np.array_equal(decoded, floats)


def test_int8_without_ranges_names_the_field(client):
    with pytest.raises(cohere.BadRequestError, match="embedding_types is int8, which needs"):
        embed(client, embedding_types=["int8"])


def test_inputs_and_fewer_dimensions(client, close):
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    answer = client.embed(model="any", inputs=inputs, input_type="search_query", output_dimension=64)
    close(answer.embeddings.float_, TEXTS, truncate_dim=64)


@pytest.mark.parametrize(("truncate", "kept"), [("END", "first "), ("START", "last ")])
def test_long_texts_are_truncated_at_the_requested_end(client, close, truncate, kept):
    text = "first " * 300 + "last " * 300
    close(embed(client, [text], truncate=truncate).embeddings.float_, [kept * 254])


def test_none_refuses_long_texts(client):
    with pytest.raises(cohere.BadRequestError, match=r"texts\[1\] has more than 256 tokens"):
        embed(client, ["short", "long " * 300], truncate="NONE")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": ["data:image/png;base64,AAAA"]}, "images is not supported: the model reads text"),
        ({}, "texts is missing"),
        ({"texts": ["a"], "inputs": []}, "inputs cannot be sent together with texts"),
        ({"inputs": [{"content": []}]}, "inputs[0] must have one content, a text"),
        ({"inputs": [{"content": [{"type": "image_url"}]}]}, "inputs[0] must have one content, a text"),
        (
            {"texts": ["a"], "max_tokens": 10},
            "max_tokens must be at least 256, the model's maximum, or left out",
        ),
        ({"texts": []}, "texts is empty; send at least one text"),
    ],
    ids=str,
)
def test_rejected_fields(service, fields, message):
    answer = requests.post(f"{service.url}/v2/embed", json=fields, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith(message)
    assert answer.json()["id"] == answer.headers["X-Request-ID"]


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
def test_version_1(connect, service, close):
    client = connect(cohere.Client, service)
    answer = client.embed(texts=TEXTS, model="any", input_type="search_document")
    close(answer.embeddings, TEXTS)
    typed = client.embed(texts=TEXTS, model="any", input_type="search_document", embedding_types=["float"])
    close(typed.embeddings.float_, TEXTS)


def test_the_prompt_of_each_side(connect, prompted, prompted_oracle, close):
    client = connect(cohere.ClientV2, prompted)
    for kind, name in (("search_query", "query"), ("search_document", "document")):
        close(embed(client, input_type=kind).embeddings.float_, TEXTS, prompted_oracle, prompt_name=name)
