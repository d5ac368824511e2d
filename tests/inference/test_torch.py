"""The torch backend: other number formats, what its errors mean, and CUDA where there is one."""

import contextlib
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.errors import StartupError
from embedding_service.inference import model as model_module
from embedding_service.inference.backends.torch import TorchBackend
from embedding_service.inference.model import Model, choose_device
from embedding_service.inference.runtime import DeviceLost, OutOfMemory
from embedding_service.inference.settings import ModelSettings
from tests.inference.fake_runtime import request
from tests.inference.test_model import embed, load, texts

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def cosines(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return (got * expected).sum(axis=1) / norms


# Number formats


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_exact_on_request(model_folder, oracle, dtype):
    model = load(model_folder, dtype=dtype)
    assert (model.info.dtype, model.info.backend) == (dtype, "torch")
    some = texts(random.Random(1), 12)
    (answer,) = embed(model, [request(some)])
    expected = oracle.encode(some, normalize_embeddings=True)
    assert cosines(answer.vectors, expected).min() > 0.998
    assert np.abs(np.linalg.norm(answer.vectors, axis=1) - 1).max() < 1e-6
    for tokens, vector in zip(model.tokenize(some, None, None), expected, strict=True):
        assert np.abs(model.forward_exact(tokens) - vector).max() < 1e-5


@pytest.mark.parametrize("kind", ["static", "routed"])
def test_exact_for_models_that_tokenise_for_themselves(tiny, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    model = load(tiny(kind), dtype="bfloat16")
    (tokens,) = model.tokenize(["the quick brown fox"], "query: ", "query")
    expected = oracle.encode_query(["the quick brown fox"])
    assert np.abs(model.forward_exact(tokens) - expected).max() < 1e-5


# What errors mean


class Failing(torch.nn.Module):
    """A model whose forward pass raises."""

    device = torch.device("cpu")

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, _features):
        raise self.error


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory, id="allocator"),
        pytest.param(torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory, id="driver"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            OutOfMemory,
            id="cublas",
        ),
        pytest.param(RuntimeError("MPS backend out of memory"), OutOfMemory, id="mps"),
        pytest.param(
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
            DeviceLost,
            id="sticky",
        ),
        pytest.param(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, id="other"),
        pytest.param(ValueError("not the device's"), ValueError, id="not of torch"),
    ],
)
def test_errors_of_the_device_are_told_apart(error, meaning):
    with pytest.raises(meaning) as caught:
        TorchBackend(Failing(error)).forward({})
    assert type(caught.value) is meaning


def test_an_out_of_memory_holds_no_tensors():
    class Holding(Failing):
        def forward(self, _features):
            held = torch.zeros(8)
            self.held = weakref.ref(held)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = Holding(ValueError())
    with pytest.raises(OutOfMemory) as caught:
        TorchBackend(model).forward({})
    assert caught.value.__context__ is None
    assert model.held() is None


# CUDA, as far as it can be seen without one


def test_inputs_reach_cuda_through_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: calls.append((device, non_blocking)) or self
    )
    cuda = torch.device("cuda:1")
    backend = TorchBackend(SimpleNamespace(device=cuda))
    assert backend._place("a string") == "a string"
    assert torch.equal(backend._place(np.arange(3)), torch.arange(3))
    assert calls == ["pin", (cuda, True)]


def test_a_second_device_is_the_current_one_of_the_models_thread(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    vectors = torch.ones(1, 4, dtype=torch.float16)
    cuda = torch.device("cuda:1")

    class OnCuda:
        device = cuda

        def __call__(self, _features):
            assert entered == [cuda]
            return {"sentence_embedding": vectors}

    assert TorchBackend(OnCuda()).forward({}).dtype == np.float32
    assert entered == [cuda]


def test_cuda_multiplies_float32_in_tf32(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # is set, and so set back
    before = torch.get_float32_matmul_precision()
    try:
        model_module._prepare("cuda:1", 1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", True) == "cuda"
    assert choose_device("cuda:1", False) == "cuda:1"
    with pytest.raises(StartupError, match="CPU_FALLBACK"):
        choose_device("cuda:2", False)


class Small:
    """A backend on a device that holds `most` tokens."""

    name = "torch"
    lanes = 1
    cpu_batch_tokens = 256

    def __init__(self, inner: TorchBackend, most: int) -> None:
        self._inner, self._most = inner, most

    def forward(self, features, lane=0, alone=True):
        if features["input_ids"].size > self._most:
            raise OutOfMemory("CUDA out of memory.")
        return self._inner.forward(features, lane, alone)


@pytest.mark.parametrize(("most", "budget"), [(10_000, 256), (200, 128), (100, 64), (48, 48)])
def test_a_batch_size_beyond_the_memory_is_halved_at_the_start(tiny, monkeypatch, most, budget):
    choose = Model._choose_backend
    monkeypatch.setattr(Model, "_choose_backend", lambda *given: Small(choose(*given), most))
    model = load(tiny("bert"), backend="torch")
    assert model.info.max_batch_tokens == model.max_batch_tokens == budget


def test_a_device_too_small_for_one_text_is_a_failed_start(tiny, monkeypatch):
    choose = Model._choose_backend
    monkeypatch.setattr(Model, "_choose_backend", lambda *given: Small(choose(*given), 40))
    with pytest.raises(StartupError, match="MAX_SEQ_LENGTH"):
        load(tiny("bert"), backend="torch")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["bert", "mpnet", "prompt-not-pooled", "left-padding", "static", "routed"])
def test_cuda_float32_equals_encode(tiny, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    model = load(tiny(kind), device="cuda", dtype="float32")
    requests = [request(texts(random.Random(kind), count)) for count in (1, 40, 5, 200)]
    for one, answer in zip(requests, embed(model, requests), strict=True):
        expected = oracle.encode(one.texts, normalize_embeddings=True)
        assert np.abs(answer.vectors - expected).max() < 2e-3  # TF32 has ten bits of mantissa


@pytest.mark.gpu
@needs_cuda
def test_cuda_float16_is_near_encode(model_folder, oracle):
    model = Model(ModelSettings(embedding_model=str(model_folder)))
    assert (model.info.device, model.info.dtype) == ("cuda", "float16")
    assert model.max_batch_tokens == 32 * 256
    some = [*texts(random.Random(2), 300), "word " * 300]
    (answer,) = embed(model, [request(some)])
    assert cosines(answer.vectors, oracle.encode(some)).min() > 0.999


@pytest.mark.gpu
@needs_cuda
def test_cuda_recovers_from_a_real_out_of_memory(model_folder, oracle):
    model = Model(ModelSettings(embedding_model=str(model_folder), device="cuda", dtype="float32"))
    some = ["word " * 200] * 500
    taken = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device="cuda")
    model.max_batch_tokens = 256 * 500
    (answer,) = embed(model, [request(some)])
    del taken
    assert cosines(answer.vectors, oracle.encode(some[:1])).min() > 0.999
