"""Texts packed without padding, as for flash attention, still get the vectors of encode().

Flash attention needs a GPU; what stands in for it here is attention in plain torch that keeps the texts
apart by the same boundaries. All the rest is what runs on CUDA: the packing, the positions, the pooling.
"""

import itertools
import random

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import modeling_flash_attention_utils as flash

from embedding_service.inference import checkpoint
from tests.inference.running import embed, load, request, texts

pytestmark = pytest.mark.slow

NAME = "flash_stand_in"


def attend(module, query, key, value, _mask, cu_seq_lens_q=None, scaling=None, **_others):
    """Attention within each text; `cu_seq_lens_q` are the boundaries."""
    assert cu_seq_lens_q is not None, "the texts came padded"
    apart = torch.full((query.shape[2], key.shape[2]), float("-inf"))
    bounds = cu_seq_lens_q.tolist()
    for first, last in itertools.pairwise(bounds):
        apart[first:last, first:last] = 0
    if getattr(module, "is_causal", False):
        apart += torch.full_like(apart, float("-inf")).triu(1)
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, apart, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flattening(monkeypatch) -> None:
    """Make every model that is loaded believe that it has flash attention."""
    transformers.AttentionInterface.register(NAME, attend)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda _name: ((None, attend), None))
    load_model = checkpoint.load_model

    def load_with_flash(*arguments) -> SentenceTransformer:
        loaded = load_model(*arguments)
        loaded[0].model.config._attn_implementation = NAME
        loaded[0].unpad_inputs = True
        assert loaded[0].can_flatten_inputs
        return loaded

    monkeypatch.setattr(checkpoint, "load_model", load_with_flash)


@pytest.mark.parametrize("kind", ["bert", "roberta-cls", "dense", "prompt-not-pooled", "left-padding"])
def test_unpadded_batches_equal_encode(tiny, flattening, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    if kind == "roberta-cls":
        oracle.max_seq_length = 38
    model = load(tiny(kind), backend="torch")
    names = [None, *(name for name, prompt in oracle.prompts.items() if prompt)]
    source = random.Random(kind)
    requests = [request(texts(source, count), prompt_name=source.choice(names)) for count in (1, 30, 2, 9, 1)]
    for one, answer in zip(requests, embed(model, requests), strict=True):
        expected = oracle.encode(one.texts, prompt_name=one.prompt_name, normalize_embeddings=True)
        assert np.abs(answer.vectors - expected).max() < 1e-5
