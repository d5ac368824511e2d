"""Text Embeddings Inference's clients: LlamaIndex's and huggingface_hub's, and its wire format."""

import asyncio

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

from tests.clients.conftest import TEXTS


@pytest.fixture(scope="module")
def client(service):
    return InferenceClient(service.url, token="none")


def test_llama_index(service, close, model_name):
    embedding = TextEmbeddingsInference(model_name=model_name, base_url=service.url)
    close(embedding.get_text_embedding_batch(TEXTS), TEXTS)
    close([embedding.get_query_embedding("hello")], ["hello"])
    close([asyncio.run(embedding.aget_text_embedding("hello"))], ["hello"])


def test_huggingface_hub(client, close):
    close(client.feature_extraction(TEXTS), TEXTS)
    close(client.feature_extraction("hello"), ["hello"])
    close(client.feature_extraction("hello", dimensions=64), ["hello"], truncate_dim=64)


def test_huggingface_hub_asynchronously(service, close):
    async def embed():
        async with AsyncInferenceClient(service.url, token="none") as client:
            return await client.feature_extraction(TEXTS)

    close(asyncio.run(embed()), TEXTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_over_long_texts_are_truncated_at_the_requested_end(client, close, model_folder, side):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_folder), device="cpu")
    model.tokenizer.truncation_side = side
    texts = ["one two three " * 100 + "end of it", "short"]
    vectors = client.feature_extraction(texts, truncate=True, truncation_direction=side)
    close(vectors, texts, model)


def test_truncate_false_refuses_over_long_texts(client):
    with pytest.raises(HfHubHTTPError, match=r"inputs\[1\] has more than 256 tokens") as caught:
        client.feature_extraction(["short", "word " * 400], truncate=False)
    assert caught.value.response.status_code == 422


@pytest.mark.parametrize("path", ["", "/similarity"])
def test_similarity(client, oracle, path):
    source, others = "a cat sat", ["a cat sat", "a kitten is sitting", "stock prices fell"]
    found = client.sentence_similarity(source, others, model=f"{client.model}{path}")
    vectors = oracle.encode([source, *others], normalize_embeddings=True)
    assert np.abs(np.array(found) - vectors[1:] @ vectors[0]).max() < 1e-5


@pytest.mark.parametrize("path", ["/", "/embed"])
def test_answers_are_bare_vectors_with_headers(service, close, path):
    answer = service.post(path, {"inputs": TEXTS, "truncate": None, "unknown": 1})
    close(answer.json(), TEXTS)
    names = ["x-compute-tokens", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"]
    numbers = [int(answer.headers[name]) for name in names]
    assert numbers[0] > len(TEXTS)
    assert 0 <= numbers[4] <= numbers[1]


def test_a_body_with_both_fields_is_the_services_own(service):
    answer = service.post("/embed", {"texts": ["a", "b"], "inputs": "c"}).json()
    assert answer["count"] == 2


def test_truncated_texts_and_tokens_are_counted(service, oracle):
    answer = service.post("/embed", {"texts": ["short", "word " * 400, "short", "word " * 254]}).json()
    assert answer["usage"]["truncated"] == [1]
    assert answer["usage"]["tokens"] == 3 + 256 + 3 + 256


@pytest.mark.parametrize("special", [True, False], ids=["special", "bare"])
def test_tokenize(service, oracle, special):
    texts = [*TEXTS, "naïve 👩‍👩‍👧 [SEP] x"]
    answer = service.post("/tokenize", {"inputs": texts, "add_special_tokens": special})
    for text, tokens in zip(texts, answer.json(), strict=True):
        own = oracle.tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        assert [token["id"] for token in tokens] == own["input_ids"]
        assert [token["special"] for token in tokens] == [flag == 1 for flag in own["special_tokens_mask"]]
        for token, (start, stop) in zip(tokens, own["offset_mapping"], strict=True):
            if token["special"]:
                assert (token["start"], token["stop"]) == (None, None)
                assert token["text"] in ("[CLS]", "[SEP]")
            else:
                assert (token["start"], token["stop"]) == (start, stop)
                assert token["text"] == text[start:stop]


def test_tokenize_of_one_text(service):
    (tokens,) = service.post("/tokenize", {"inputs": "hello"}).json()
    assert [token["text"] for token in tokens] == ["[CLS]", "hello", "[SEP]"]


HELLO = [101, 7592, 2088, 102]


@pytest.fixture(scope="module")
def of_ids(oracle):
    """The vectors of token ids as Text Embeddings Inference reads them: decoded, and without more tokens."""

    def vectors(ids, kind="sentence_embedding"):
        import torch

        text = oracle.tokenizer.decode(ids, clean_up_tokenization_spaces=True)
        inputs = oracle.tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.inference_mode():
            return oracle(dict(inputs))[kind][0].numpy()

    return vectors


@pytest.mark.parametrize("path", ["/", "/embed", "/v1", "/invocations"])
def test_token_ids_are_read_without_further_tokens(service, oracle, of_ids, path):
    sent = ["hello", [7592, 2088], HELLO, [7592] * 300, [19204, 3989, 999], "hello", [7592, 2088]]
    answer = service.post(path, {"inputs": sent})
    expected = [oracle.encode(each) if isinstance(each, str) else of_ids(each) for each in sent]
    assert np.abs(np.array(answer.json()) - expected).max() < 1e-5
    assert np.abs(np.array(answer.json()[2]) - oracle.encode("hello world")).max() < 1e-5
    assert answer.headers["x-compute-tokens"] == str(3 + 2 + 4 + 256 + 3 + 3 + 2)
    assert answer.headers["x-compute-characters"] == str(5 + 2 + 4 + 300 + 3 + 5 + 2)


def test_a_list_of_nothing_but_ids_is_one_text(service, of_ids):
    (vector,) = service.post("/", {"inputs": [7592, 2088]}).json()
    assert np.abs(np.array(vector) - of_ids([7592, 2088])).max() < 1e-5


def test_ids_with_a_prompt_are_read_like_their_text(prompted, prompted_oracle):
    answer = prompted.post("/", {"inputs": [HELLO, [7592, 2088]], "prompt_name": "query"})
    expected = prompted_oracle.encode(["hello world"] * 2, prompt_name="query")
    assert np.abs(np.array(answer.json()) - expected).max() < 1e-5


def test_each_token_id_has_a_vector(service, of_ids):
    sent = [[7592, 2088], "hello world"]
    bare, whole = service.post("/embed_all", {"inputs": sent}).json()
    assert np.abs(np.array(bare) - of_ids([7592, 2088], "token_embeddings")).max() < 1e-4
    assert np.abs(np.array(whole) - of_ids(HELLO, "token_embeddings")).max() < 1e-4


def test_token_ids_that_are_too_many_are_refused_if_asked(service):
    answer = service.post("/", {"inputs": ["a", [7592] * 300], "truncate": False})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("inputs[1] has more than 256 tokens")


@pytest.mark.parametrize("skip", [True, False, None])
def test_decode(service, oracle, skip):
    lists = [HELLO, [19204, 3989, 999], [101, 102]]
    answer = service.post("/decode", {"ids": lists, "skip_special_tokens": skip})
    assert answer.json() == oracle.tokenizer.batch_decode(
        lists, skip_special_tokens=skip is not False, clean_up_tokenization_spaces=True
    )
    assert service.post("/decode", {"ids": HELLO}).json() == ["hello world"]


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/", {"inputs": ["a", [30522]]}, "inputs[1] holds the token id 30522, which is not in the model's"),
        ("/", {"inputs": ["a", [-1]]}, "inputs[1] holds -1, which is not a token id"),
        ("/", {"inputs": [[7592], [10**30]]}, f"inputs[1] holds {10**30}, which is not a token id"),
        ("/", {"inputs": ["a", 7592]}, "inputs mixes token ids with texts"),
        ("/", {"inputs": [[7592], ["a"]]}, 'inputs[1][0] must be a whole number, not "a"'),
        ("/", {"inputs": ["a", []]}, "inputs[1] is empty"),
        ("/", {"inputs": [[7592] * 100_001]}, "inputs[0] has 100001 token ids"),
        ("/", {"inputs": ["a", [7592]], "overflow": "mean"}, "inputs[1] is token ids, which cannot be cut"),
        ("/embed_all", {"inputs": ["a", [30522]]}, "inputs[1] holds the token id 30522"),
        ("/tokenize", {"inputs": [[7592]]}, "inputs[0] must be a string, not an array"),
        ("/decode", {"ids": [7592, 30522]}, "ids[0] holds the token id 30522"),
        ("/decode", {"ids": [[7592], [-1]]}, "ids[1] holds -1"),
        ("/decode", {"ids": []}, "ids is empty"),
        ("/decode", {"ids": [[7592] * 1000] * 1001}, "ids has 1001000 ids in all"),
        ("/decode", {"ids": "hello"}, "ids must be an array of whole numbers, not"),
        ("/decode", {}, "ids is missing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_names_the_token_ids(service, path, body, error):
    answer = service.post(path, body)
    assert answer.status_code in (400, 413, 422)
    assert answer.json()["error"].startswith(error)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/", {"inputs": []}, 400),
        ("/", {"inputs": [None, 2]}, 422),
        ("/", {}, 422),
        ("/embed", {"inputs": 3}, 422),
        ("/embed", {"inputs": "x", "dimensions": 1000}, 422),
        ("/embed", {"inputs": "x", "prompt_name": "nonsense"}, 422),
        ("/embed", {"inputs": ["x"] * 4097}, 413),
        ("/embed", {"inputs": "x" * 100_001}, 413),
        ("/tokenize", {"inputs": ["x" * 100_000] * 11}, 413),
        ("/tokenize", {"inputs": [None]}, 422),
        ("/similarity", {"inputs": {"source_sentence": "x", "sentences": []}}, 400),
        ("/similarity", {"inputs": "x"}, 422),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_its_own(service, path, body, status):
    answer = service.post(path, body)
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "error_type"}
    assert answer.json()["error_type"] == ("Empty" if status == 400 else "Validation")


@pytest.mark.parametrize("body", [{}, {"texts": 3}, {"text": "x"}, [], "inputs"], ids=str)
def test_other_errors_of_embed_are_the_services_own(service, body):
    answer = service.post("/embed", body)
    assert answer.status_code == 400
    assert answer.json()["error_type"] == "validation"


def test_surrogates_in_tokenize_are_refused(service):
    import requests

    answer = requests.post(f"{service.url}/tokenize", data=b'{"inputs": "\\ud800"}', timeout=60)
    assert answer.status_code == 422


def test_info_has_teis_names_as_well(service, model_name):
    import requests

    info = requests.get(f"{service.url}/info", timeout=60).json()
    assert info["model_id"] == info["model_name"] == model_name
    assert info["max_input_length"] == info["max_seq_length"] == 256
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_client_batch_size"] >= 2048
