"""Ollama's client against the real service."""

import asyncio

import ollama
import pytest

from tests.clients.conftest import TEXTS


@pytest.fixture(scope="module")
def client(service):
    with ollama.Client(host=service.url) as client:
        yield client


def test_embed(client, close, model_name):
    answer = client.embed(model="nomic-embed-text", input=TEXTS, keep_alive="5m", options={"num_ctx": 512})
    close(answer.embeddings, TEXTS)
    assert answer.model == model_name
    assert answer.prompt_eval_count > len(TEXTS)
    assert 0 < answer.total_duration < 120e9
    assert answer.load_duration == 0


def test_embed_one_text_in_fewer_dimensions(client, close):
    close(client.embed(model="any", input="hello", dimensions=64).embeddings, ["hello"], truncate_dim=64)


def test_embed_without_input_is_a_preload(client):
    assert client.embed(model="any").embeddings == []


def test_the_older_form(client, close):
    close([client.embeddings(model="any", prompt="hello").embedding], ["hello"], normalize_embeddings=False)


def test_the_asynchronous_client(service, close):
    async def embed():
        async with ollama.AsyncClient(host=service.url) as client:
            return await client.embed(model="any", input=TEXTS)

    close(asyncio.run(embed()).embeddings, TEXTS)


def test_list(client, model_name):
    models = client.list().models
    assert models[0].model == f"{model_name}:latest"
    assert models[0].modified_at is not None
    assert (models[0].details.family, models[0].details.parameter_size) == ("bert", "22.7M")
    assert models[0].size > 40e6


@pytest.mark.parametrize("name", ["all-minilm", "all-minilm:latest", "any"])
def test_clients_that_look_up_a_name_first_find_it(client, name, model_name):
    shown = client.show(name)
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo["bert.embedding_length"] == 384
    assert client.pull(name).status == "success"
    assert [progress.status for progress in client.pull(name, stream=True)] == [
        "pulling manifest",
        "success",
    ]
    assert [model.model for model in client.ps().models] == [f"{model_name}:latest"]


def test_truncate_false_refuses_over_long_texts(client):
    with pytest.raises(ollama.ResponseError, match=r"input\[0\] has more than 256 tokens") as caught:
        client.embed(model="any", input="word " * 400, truncate=False)
    assert caught.value.status_code == 400


def test_an_unknown_route_gets_an_error_in_ollamas_format(client):
    with pytest.raises(ollama.ResponseError, match="embeds texts and generates none") as caught:
        client.generate(model="any", prompt="hello")
    assert caught.value.status_code == 404
