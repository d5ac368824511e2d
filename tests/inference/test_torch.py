"""The torch backend: number formats, the meaning of errors, and CUDA if there is a device."""

import contextlib
import random
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.errors import StartupError
from embedding_service.inference.backends import torch as backend
from embedding_service.inference.backends.torch import CudaSession, TorchSession, torch_backend
from embedding_service.inference.device import choose_device, prepare_libraries
from embedding_service.inference.runtime import DeviceLost, OutOfMemory
from embedding_service.inference.tokenized import Rows, TokenizedTexts
from embedding_service.inference.warm_up import fit_memory
from tests.inference.running import alone, embed, load, request, texts
from tests.service import wait_until

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def cosines(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return (got * expected).sum(axis=1) / norms


# Number formats


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_exact_on_request(model_folder, oracle, dtype):
    model = load(model_folder, dtype=dtype, backend="torch")
    assert (model.info.dtype, model.info.backend) == (dtype, "torch")
    some = texts(random.Random(1), 12)
    (answer,) = embed(model, [request(some)])
    expected = oracle.encode(some, normalize_embeddings=True)
    assert cosines(answer.vectors, expected).min() > 0.998
    assert np.abs(np.linalg.norm(answer.vectors, axis=1) - 1).max() < 1e-6
    for text, vector in zip(some, expected, strict=True):
        assert np.abs(model.exact.forward(alone(model, text)) - vector).max() < 1e-5


@pytest.mark.parametrize("kind", ["static", "routed"])
def test_exact_for_models_that_tokenize_for_themselves(tiny, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    model = load(tiny(kind), dtype="bfloat16")
    one = alone(model, "the quick brown fox", "query: ", "query")
    expected = oracle.encode_query(["the quick brown fox"])
    assert np.abs(model.exact.forward(one) - expected).max() < 1e-5


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
def test_device_errors_are_distinguished(error, meaning):
    with pytest.raises(meaning) as caught:
        TorchSession(Failing(error)).run({})
    assert type(caught.value) is meaning


def test_an_out_of_memory_error_keeps_no_tensors_alive():
    class Holding(Failing):
        def forward(self, _features):
            held = torch.zeros(8)
            self.held = weakref.ref(held)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = Holding(ValueError())
    with pytest.raises(OutOfMemory) as caught:
        TorchSession(model).run({})
    assert caught.value.__context__ is None
    assert model.held() is None


# CUDA, as far as it can be tested without a device


class Recorder:
    """Records the calls to CUDA, in order; the tensors stay on the CPU."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list = []
        self.current: list = []
        monkeypatch.setattr(torch.cuda, "device", self._within)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "the default stream")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, device))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self, blocking))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._say("pin", tensor))
        monkeypatch.setattr(
            torch.Tensor,
            "to",
            lambda tensor, device, non_blocking: self._say(("to", device, non_blocking), tensor),
        )
        empty = torch.empty

        def empty_in_pinned_memory(*shape, pin_memory, **named):
            assert pin_memory
            return empty(*shape, **named)

        monkeypatch.setattr(torch, "empty", empty_in_pinned_memory)

    def _say(self, call, result):
        self.calls.append(call)
        return result

    @contextlib.contextmanager
    def _within(self, what):
        self.current.append(what)
        yield
        self.current.pop()


class Stream:
    def __init__(self, recorder, device) -> None:
        assert recorder.current == [device]
        self._recorder = recorder

    def wait_stream(self, other) -> None:
        self._recorder.calls.append(("waits for", other))


class Event:
    def __init__(self, recorder, blocking) -> None:
        self._recorder, self.blocking = recorder, blocking

    def record(self, stream) -> None:
        assert self._recorder.current[-1] is stream
        self._recorder.calls.append("record")

    def synchronize(self) -> None:
        assert self._recorder.current == []
        self._recorder.calls.append("wait")


def test_a_cuda_session_copies_through_pinned_memory_on_its_own_stream(monkeypatch):
    cuda = torch.device("cuda:1")
    recorder = Recorder(monkeypatch)

    class OnCuda:
        device = cuda

        def __call__(self, features):
            assert recorder.current[0] == cuda
            assert isinstance(recorder.current[1], Stream)
            recorder.calls.append("forward")
            return {"sentence_embedding": features["input_ids"].half()}

    session = CudaSession(OnCuda())
    vectors = session.run({"input_ids": np.arange(3)[None], "modality": "text"})
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[0, 1, 2]]
    assert recorder.calls == [
        ("waits for", "the default stream"),
        "pin",
        ("to", cuda, True),
        "forward",
        "record",
        "wait",
    ]


def test_cuda_has_two_streams_and_no_session_shares_one(monkeypatch):
    Recorder(monkeypatch)
    sessions = torch_backend(SimpleNamespace(device=torch.device("cuda:0")), 1).sessions
    assert len(sessions) == backend.CUDA_STREAMS == 2
    assert len({id(vars(session)["_stream"]) for session in sessions}) == 2


def test_the_thread_that_records_graphs_ends_before_python_does(monkeypatch):
    Recorder(monkeypatch)
    ends: list = []
    recorded: list = []
    before = set(threading.enumerate())
    monkeypatch.setattr(backend.atexit, "register", ends.append)
    monkeypatch.setattr(
        backend, "record_graphs", lambda *arguments: recorded.extend(iter(arguments[-1].get, None))
    )
    torch_backend(SimpleNamespace(device=torch.device("cuda:0")), 1).record(None, 256, 8192)
    (thread,) = set(threading.enumerate()) - before
    (end,) = ends
    end()
    assert not thread.is_alive()


@pytest.mark.parametrize(("cores", "sleeps"), [(1, True), (7, True), (8, False), (64, False)])
def test_only_where_cores_are_plenty_threads_spin_while_they_wait_for_the_device(monkeypatch, cores, sleeps):
    Recorder(monkeypatch)
    sessions = torch_backend(SimpleNamespace(device=torch.device("cuda:0")), cores).sessions
    assert [vars(session)["_done"].blocking for session in sessions] == [sleeps] * 2


def test_cuda_multiplies_float32_in_tf32(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # is set, and so set back
    before = torch.get_float32_matmul_precision()
    try:
        prepare_libraries("cuda:1", 1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_is_cuda_if_there_is_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", True) == "cuda"
    assert choose_device("cuda:1", False) == "cuda:1"
    with pytest.raises(StartupError, match="CPU_FALLBACK"):
        choose_device("cuda:2", False)


class FullStream:
    """Has the whole memory of the device, enough for this many tokens, since the other stream is waiting."""

    def __init__(self, most: int) -> None:
        self._most = most

    def forward(self, batch):
        if sum(int(part.lengths.max()) * len(part.rows) for part in batch) > self._most:
            raise OutOfMemory("CUDA out of memory.")
        return np.zeros((sum(len(part.rows) for part in batch), 4), np.float32)


def texts_of(tokens: int) -> TokenizedTexts:
    return TokenizedTexts(np.array([tokens], np.int32), np.array([False]), None, None)


@pytest.mark.parametrize(("most", "budget"), [(10_000, 1536), (3072, 1536), (2000, 768), (200, 96), (96, 48)])
def test_a_batch_size_that_does_not_fit_all_streams_is_halved_at_the_start(most, budget):
    assert fit_memory([FullStream(most)] * 2, texts_of(4), texts_of(48), 32 * 48, 48) == budget


def test_a_device_too_small_for_one_text_fails_the_start():
    with pytest.raises(StartupError, match="MAX_SEQ_LENGTH"):
        fit_memory([FullStream(80)] * 2, texts_of(4), texts_of(48), 32 * 48, 48)


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
    model = load(model_folder, device="auto")
    assert (model.info.device, model.info.dtype) == ("cuda", "float16")
    assert model.info.max_batch_tokens == 32 * 256
    some = [*texts(random.Random(2), 300), "word " * 300]
    (answer,) = embed(model, [request(some)])
    assert cosines(answer.vectors, oracle.encode(some)).min() > 0.999


@pytest.mark.gpu
@needs_cuda
def test_cuda_graphs_run_and_give_the_vectors_of_single_launches(model_folder):
    model = load(model_folder, device="cuda", dtype="float32")
    session: CudaSession = model.streams[0]._session  # type: ignore[attr-defined]
    wait_until(lambda: session.graphs is not None, "the limit of graphs")
    graphs = session.graphs
    assert graphs and graphs.max_tokens >= 256
    source = random.Random(3)
    for count in (1, 7, 40):
        batch = [Rows.all_of(model.preprocessor.prepare(texts(source, count), None, None))]
        unpadded = model.preprocessor.pack_unpadded(batch)  # type: ignore[attr-defined]
        shape = graphs.shapes.around(len(unpadded.lengths), unpadded.width)
        session.record(graphs, shape)
        assert graphs._recorded[shape] is not None
        alone = session.run_with(None, unpadded)
        assert np.abs(session.run_with(graphs, unpadded) - alone).max() < 2e-3


@pytest.mark.gpu
@needs_cuda
def test_cuda_recovers_from_a_real_out_of_memory(model_folder, oracle):
    model = load(model_folder, device="cuda", dtype="float32")
    some = ["word " * 200] * 500
    taken = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device="cuda")
    (answer,) = embed(model, [request(some)])
    del taken
    assert cosines(answer.vectors, oracle.encode(some[:1])).min() > 0.999
