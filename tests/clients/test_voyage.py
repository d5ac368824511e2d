"""Voyage's own SDK against the real service."""

import numpy as np
import pytest
import voyageai
from sentence_transformers.util import quantize_embeddings

from tests.clients.conftest import TEXTS


@pytest.fixture(scope="module")
def client(service):
    return voyageai.Client(api_key="none", base_url=f"{service.url}/v1")


def test_floats_by_default(client, close):
    answer = client.embed(TEXTS, model="any")
    close(answer.embeddings, TEXTS)
    assert answer.total_tokens > len(TEXTS)


def test_smaller_formats_equal_those_of_sentence_transformers(client):
    floats = np.array(client.embed(TEXTS, model="any").embeddings, np.float32)
    for name in ("binary", "ubinary"):
        got = client.embed(TEXTS, model="any", output_dtype=name).embeddings
        assert got == quantize_embeddings(floats, precision=name).tolist()


def test_int8_without_ranges_names_the_field(client):
    with pytest.raises(voyageai.error.InvalidRequestError, match="output_dtype is int8, which needs"):
        client.embed(TEXTS, model="any", output_dtype="int8")


def test_fewer_dimensions(client, close):
    close(client.embed(TEXTS, model="any", output_dimension=64).embeddings, TEXTS, truncate_dim=64)


def test_long_texts_are_refused_if_truncation_is_off(client):
    with pytest.raises(voyageai.error.InvalidRequestError, match="has more than 256 tokens"):
        client.embed(["short", "long " * 300], model="any", truncation=False)


def test_a_missing_key_raises_voyages_own_error(start_without_model):
    service = start_without_model(API_KEYS="secret").wait_ready()
    with pytest.raises(voyageai.error.AuthenticationError):
        voyageai.Client(api_key="other", base_url=f"{service.url}/v1").embed(["a"], model="any")
