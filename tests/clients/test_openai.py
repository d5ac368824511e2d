"""OpenAI's clients: the official SDK, LangChain and LlamaIndex, against the real service."""

import asyncio
import base64
import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
import tiktoken
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from sentence_transformers.util import quantize_embeddings

from tests.clients.conftest import TEXTS


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def langchain_client(service, monkeypatch):
    """LangChain's client. Its tokenizer makes a token of each byte, since OpenAI's must be downloaded."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", encoding)

    def make(**arguments) -> OpenAIEmbeddings:
        return OpenAIEmbeddings(base_url=f"{service.url}/v1", api_key="none", max_retries=0, **arguments)

    return make


def test_the_sdk_gets_the_oracles_vectors_as_base64(client, close, oracle, model_name):
    answer = client.embeddings.create(input=TEXTS, model="text-embedding-3-small")
    close([item.embedding for item in answer.data], TEXTS)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    assert answer.model == model_name
    lengths = [min(256, len(oracle.tokenizer(text)["input_ids"])) for text in TEXTS]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)


def test_the_sdk_asks_for_base64_by_itself(client):
    raw = client.embeddings.with_raw_response.create(input="hello", model="any")
    assert b"base64" in raw.http_response.request.read()
    assert isinstance(raw.http_response.json()["data"][0]["embedding"], str)


def test_the_sdk_may_ask_for_floats_and_fewer_dimensions(client, close):
    answer = client.embeddings.create(input="hello", model="any", encoding_format="float", dimensions=64)
    close([answer.data[0].embedding], ["hello"], truncate_dim=64)


def test_the_asynchronous_sdk(service, close):
    async def embed():
        async with openai.AsyncOpenAI(base_url=service.url, api_key="none") as client:
            return await asyncio.gather(
                *(client.embeddings.create(input=text, model="any") for text in TEXTS)
            )

    close([answer.data[0].embedding for answer in asyncio.run(embed())], TEXTS)


def test_2048_inputs_in_one_request(client, close):
    texts = [f"text number {number}" for number in range(2048)]
    answer = client.embeddings.create(input=texts, model="any")
    assert len(answer.data) == 2048
    sample = [0, 1, 31, 32, 1023, 2047]
    close([answer.data[index].embedding for index in sample], [texts[index] for index in sample])


def test_the_list_of_models_has_the_one(client, model_name):
    assert [model.id for model in client.models.list()] == [model_name]
    assert client.models.retrieve(model_name).id == model_name
    assert client.models.retrieve("text-embedding-3-small").id == model_name


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]], ids=["one", "many"])
def test_token_ids_are_rejected_with_a_remedy(client, ids):
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as caught:
        client.embeddings.create(input=ids, model="any")
    assert caught.value.param == "input"
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"input": ["fine", 3]}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 385}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
    ids=str,
)
def test_the_invalid_parameter_is_named(client, arguments, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="any", **arguments)
    assert caught.value.param == param


def test_errors_outside_the_views_have_the_same_form(service):
    for method, path, status in [
        ("GET", "/v1/embeddings", 405),
        ("GET", "/v1/engines", 404),
        ("POST", "/v1/embeddings", 415),
    ]:
        answer = requests.request(method, service.url + path, data={"form": "1"}, timeout=60)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_langchain(langchain_client, close):
    embeddings = langchain_client(model="any", check_embedding_ctx_length=False)
    close(embeddings.embed_documents(TEXTS), TEXTS)
    close([embeddings.embed_query("hello")], ["hello"])


def test_langchain_with_token_ids_gets_a_remedy(langchain_client):
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain_client().embed_documents(["hello"])


def test_langchain_with_fewer_dimensions(langchain_client, close):
    embeddings = langchain_client(model="any", check_embedding_ctx_length=False, dimensions=32)
    close(embeddings.embed_documents(["hello"]), ["hello"], truncate_dim=32)


def test_llama_index(service, close, model_name):
    embedding = OpenAILikeEmbedding(model_name=model_name, api_base=f"{service.url}/v1", max_retries=0)
    texts = [text for text in TEXTS if text]
    # LlamaIndex itself replaces line breaks.
    close(embedding.get_text_embedding_batch(texts), [text.replace("\n", " ") for text in texts])
    close([embedding.get_query_embedding("hello")], ["hello"])


def test_base64_is_little_endian_float32(service, oracle):
    import base64

    answer = service.post("/v1/embeddings", {"input": "hello", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert np.abs(vector - oracle.encode("hello", normalize_embeddings=True)).max() < 1e-5


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        ("retrieval.query", "query"),
        ("retrieval.passage", "document"),
        ("code.query", "query"),
        ("nl2code.passage", "document"),
    ],
)
def test_jinas_task_chooses_the_prompt(prompted, prompted_oracle, close, task, prompt):
    body = {"model": "jina-embeddings-v3", "input": TEXTS, "task": task, "embedding_type": "float"}
    answer = requests.post(f"{prompted.url}/v1/embeddings", json=body, timeout=60).json()
    close([row["embedding"] for row in answer["data"]], TEXTS, prompted_oracle, prompt_name=prompt)


def test_jinas_objects_with_a_text(service, close):
    body = {"input": [TEXTS[0], *({"text": text} for text in TEXTS[1:])]}
    answer = requests.post(f"{service.url}/v1/embeddings", json=body, timeout=60).json()
    close([row["embedding"] for row in answer["data"]], TEXTS)


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ({"image": "https://example.com/a.png"}, "input[1] holds an image; the model reads text"),
        ({"text": "a", "image": "iVBORw0KGgo="}, "input[1] holds an image; the model reads text"),
        ({"pdf": "JVBERi0="}, "input[1] holds no text"),
        ({"text": 1}, "input[1].text must be a string, not 1"),
        ({"text": "long " * 300}, "input[1] has more than 256 tokens"),
        (7, "input[1] must be a string or an object, not 7"),
    ],
    ids=str,
)
def test_an_error_names_jinas_object(service, item, error):
    body = {"input": [{"text": "fine"}, item], "truncation": False}
    answer = requests.post(f"{service.url}/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(error)


def test_jinas_embedding_type(service):
    def ask(**fields):
        body = {"input": ["hello"]} | fields
        return requests.post(f"{service.url}/v1/embeddings", json=body, timeout=60).json()["data"][0][
            "embedding"
        ]

    floats = np.array([ask()], np.float32)
    assert ask(embedding_type="binary") == quantize_embeddings(floats, precision="binary")[0].tolist()
    assert np.array_equal(np.frombuffer(base64.b64decode(ask(embedding_type="base64")), "<f4"), floats[0])


def test_late_chunking_is_refused(service):
    body = {"input": ["hello"], "late_chunking": True}
    answer = requests.post(f"{service.url}/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("late_chunking is not supported")


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """tiktoken's own file of the vocabulary, where tiktoken looks before it downloads."""
    # The package is not imported here: it warns of its own use of importlib.resources.
    package = importlib.util.find_spec("bpe_openai")
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    packed = Path(package.origin).with_name("data") / "cl100k_base.tiktoken.gz"
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(gzip.decompress(packed.read_bytes()))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


def test_token_ids_of_the_models_own_vocabulary(start, oracle):
    running = start(TOKEN_IDS="model").wait_ready()
    texts = ["hello world", "東京は日本の首都です 👩‍👩‍👧", "word " * 400]
    ids = oracle.tokenizer(texts)["input_ids"]
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    answer = client.embeddings.create(model="any", input=ids)
    # Cut, the last one ends without [SEP], where the text has it.
    found = np.array([one.embedding for one in answer.data])
    assert np.abs(found - oracle.encode(texts, normalize_embeddings=True))[:2].max() < 1e-5
    assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1]) + 256
    mixed = running.post("/v1/embeddings", {"input": [texts[0], ids[0]], "dimensions": 64}).json()["data"]
    assert np.abs(np.subtract(mixed[0]["embedding"], mixed[1]["embedding"])).max() < 1e-6
    for bad in ([[7592], [-1]], [[7592], [10**9]], [[7592], [10**30]]):
        refused = running.post("/v1/embeddings", {"input": bad})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("input[1] holds ")


def test_langchain_at_its_defaults_sends_ids_that_are_decoded(start_without_model, vocabulary):
    running = start_without_model(TOKEN_IDS="cl100k_base").wait_ready()
    client = OpenAIEmbeddings(base_url=f"{running.url}/v1", api_key="none")
    texts = ["hello world", "東京は日本の首都です", "Größe"]
    expected = running.post("/embed", {"texts": texts}).json()["embeddings"]
    assert np.abs(np.array(client.embed_documents(texts)) - expected).max() < 1e-6
    assert np.abs(np.array(client.embed_query(texts[1])) - expected[1]).max() < 1e-6
    for bad in ([[-1]], [[10**9]], [[15339], [10**30]]):
        refused = running.post("/v1/embeddings", {"input": bad})
        assert refused.status_code == 400, refused.text
