"""Every kind of SentenceTransformer gives the vectors of encode(), whatever else is in the batch."""

import json
import logging
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from embedding_service.engine import EmbedRequest
from embedding_service.errors import InvalidRequest, StartupError
from tests.inference import tiny_models
from tests.inference.running import embed, load, request, texts

pytestmark = pytest.mark.slow

# OpenVINO gives NaN for a row of attention that is masked completely, as with padding on the left, and it
# cannot trace Gemma's masks.
TORCH_ONLY = ["static", "routed", "left-padding", "left-padding-prompt-not-pooled", "gemma"]
CASES = [(kind, "torch") for kind in tiny_models.KINDS]
CASES += [(kind, "openvino") for kind in tiny_models.KINDS if kind not in TORCH_ONLY]


@pytest.mark.parametrize(("kind", "backend"), CASES, ids=[f"{kind}-{backend}" for kind, backend in CASES])
def test_vectors_equal_encode_for_any_mixture(tiny, kind, backend):
    folder = tiny(kind)
    oracle = SentenceTransformer(str(folder), device="cpu")
    model = load(folder, backend=backend)
    assert model.info.backend == backend
    if kind == "roberta-cls":
        oracle.max_seq_length = 38  # by itself it fails at a text longer than its positions
    if kind == "texts-and-images":
        oracle.max_seq_length = 16  # likewise
    source = random.Random(kind)
    names = [None, *(name for name, prompt in oracle.prompts.items() if prompt)]
    requests = [
        request(texts(source, count), prompt_name=source.choice(names), normalize=source.random() < 0.5)
        for count in (1, 2, 30, 5, 1, 12, 3, 60, 1, 7)
    ]
    for one, answer in zip(requests, embed(model, requests), strict=True):
        expected = oracle.encode(
            one.texts,
            prompt_name=one.prompt_name,
            normalize_embeddings=one.normalize,
            batch_size=1 if kind == "no-mask" else 7,  # its vectors change with padding
        )
        assert np.abs(answer.vectors - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["prompts", "prompt-not-pooled", "left-padding", "static", "routed"])
@pytest.mark.parametrize("input_type", ["query", "document"])
def test_input_types_equal_encode_query_and_encode_document(tiny, kind, input_type):
    folder = tiny(kind)
    oracle = SentenceTransformer(str(folder), device="cpu")
    model = load(folder)
    some = texts(random.Random(3), 20)
    (answer,) = embed(model, [request(some, input_type=input_type, normalize=False)])
    expected = getattr(oracle, f"encode_{input_type}")(some)
    assert np.abs(answer.vectors - expected).max() < 1e-5


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_the_default_model_equals_encode(model_folder, oracle, backend):
    model = load(model_folder, backend=backend)
    source = random.Random(backend)
    requests = [request(texts(source, count)) for count in (1, 40, 3)]
    requests.append(request(["word " * 300, "x " * 5000]))
    for one, answer in zip(requests, embed(model, requests), strict=True):
        expected = oracle.encode(one.texts, normalize_embeddings=True)
        assert np.abs(answer.vectors - expected).max() < 1e-5
    assert answer.truncated == [0, 1]


@pytest.mark.parametrize("kind", ["bert", "mpnet", "left-padding"])
def test_max_seq_length_can_lower_the_models_own(tiny, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    oracle.max_seq_length = 12
    model = load(tiny(kind), max_seq_length=12)
    some = [*texts(random.Random(5), 20), "the quick brown fox " * 9]
    (answer,) = embed(model, [request(some)])
    assert model.info.max_seq_length == 12
    assert np.abs(answer.vectors - oracle.encode(some, normalize_embeddings=True)).max() < 1e-5
    assert len(some) - 1 in answer.truncated


def test_max_seq_length_never_exceeds_the_models_positions(tiny):
    # Saved with 40 positions, two of them for padding, and a tokenizer with a limit of 48.
    assert load(tiny("roberta-cls"), max_seq_length=256).info.max_seq_length == 38


def test_a_static_model_reads_the_whole_text(tiny):
    oracle = SentenceTransformer(str(tiny("static")), device="cpu")
    some = ["the quick brown fox " * 500, "fox"]
    (answer,) = embed(load(tiny("static")), [request(some)])
    assert np.abs(answer.vectors - oracle.encode(some, normalize_embeddings=True)).max() < 1e-5
    assert answer.truncated == []
    assert answer.tokens == 2001
    assert load(tiny("static")).info.reads_whole_texts
    assert not load(tiny("bert")).info.reads_whole_texts


def test_an_unknown_prompt_is_rejected_with_the_known_ones(tiny):
    with pytest.raises(InvalidRequest, match="long, passage, query"):
        load(tiny("left-padding")).prompt(EmbedRequest(texts=["a"], deadline=0, prompt_name="nope"))


@pytest.mark.parametrize("kind", TORCH_ONLY)
def test_requested_openvino_that_cannot_run_fails_the_start(tiny, kind):
    level = logging.getLogger().level
    with pytest.raises(StartupError, match=r"BACKEND=openvino|OpenVINO cannot run"):
        load(tiny(kind), backend="openvino")
    assert logging.getLogger().level == level


def test_a_model_that_openvino_computes_wrongly_runs_in_torch(tiny, caplog):
    assert load(tiny("left-padding")).info.backend == "torch"
    assert (
        "OpenVINO cannot run this model, using torch: its vectors differ from torch's by nan" in caplog.text
    )


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_truncate_dim_of_the_model_is_honoured(tiny, tmp_path, backend):
    folder = tmp_path / "model"
    SentenceTransformer(str(tiny("dense")), device="cpu", truncate_dim=7).save(str(folder))
    model, some = load(folder, backend=backend), texts(random.Random(5), 9)
    expected = SentenceTransformer(str(folder), device="cpu").encode(some)
    (answer,) = embed(model, [request(some, normalize=False)])
    assert model.info.embedding_dimension == 7
    assert np.abs(answer.vectors - expected).max() < 1e-5
    (unit,) = embed(model, [request(some)])
    assert np.abs(np.linalg.norm(unit.vectors, axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("dimension", [0, -1, "8"])
def test_an_impossible_truncate_dim_is_refused(tiny, tmp_path, dimension):
    folder = tmp_path / "model"
    shutil.copytree(tiny("dense"), folder)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "truncate_dim": dimension}))
    with pytest.raises(StartupError, match="has truncate_dim="):
        load(folder)


def without_weights(folder, copy, part):
    """A copy of a model whose file of weights lacks those with `part` in their names; and these names."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("**/model.safetensors")
    weights = load_file(file)
    lacking = [name for name in weights if part in name]
    save_file({name: weights[name] for name in weights if name not in lacking}, file, {"format": "pt"})
    return lacking


@pytest.mark.parametrize("part", ["layer.1.attention.self.query.weight", "word_embeddings", "layer.0"])
def test_a_model_that_lacks_weights_is_refused(tiny, tmp_path, part):
    lacking = without_weights(tiny("bert"), tmp_path / "model", part)
    with pytest.raises(StartupError, match="is incomplete: its files lack the weights ") as refusal:
        load(tmp_path / "model")
    assert str(refusal.value).rsplit(" ", 1)[1] in lacking


def test_weights_that_play_no_part_may_be_missing(tiny, tmp_path):
    assert without_weights(tiny("bert"), tmp_path / "model", "pooler.")
    some = texts(random.Random(5), 9)
    expected = SentenceTransformer(str(tiny("bert")), device="cpu").encode(some)
    (answer,) = embed(load(tmp_path / "model", backend="torch"), [request(some, normalize=False)])
    assert np.abs(answer.vectors - expected).max() < 1e-5
