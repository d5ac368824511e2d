"""Loading and warming up on CUDA, with weights that have a device, a shape and a format but no content."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from embedding_service.inference import warm_up
from embedding_service.inference.backends import torch as torch_backend
from embedding_service.inference.backends.torch import CudaSession
from embedding_service.inference.device import prepare_libraries
from embedding_service.inference.pending import normalize
from embedding_service.inference.preprocessing import RustTokenizer
from tests.inference.running import alone, load
from tests.inference.test_cuda_path import CUDA, Watch, WithoutGuards, cuda  # noqa: F401

pytestmark = pytest.mark.slow


class Moving(WithoutGuards):
    """Also moves real tensors to a device that does not exist."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is not torch.Tensor.to or isinstance(arguments[0], FakeTensor):
            return super().__torch_function__(function, types, arguments, named)
        device, dtype, _, _ = torch._C._nn._parse_to(*arguments[1:], **named or {})
        if device is None or device.type != "cuda":
            return function(*arguments, **named or {})
        shape = torch.empty_like(arguments[0], device="meta", dtype=dtype)
        return FakeTensor(self._mode, shape, CUDA)


def apply(module: torch.nn.Module, function, recurse=True) -> torch.nn.Module:
    """Like Module._apply, but for tensors without content."""
    for child in module.children() if recurse else []:
        child._apply(function)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                made = function(tensor).detach()
                is_weight = isinstance(tensor, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(made, requires_grad=False) if is_weight else made
    return module


class Machine:
    """A machine with one CUDA device, which records what each forward pass did."""

    def __init__(self, monkeypatch, streams: list[str]) -> None:
        self.mode = FakeTensorMode()
        self.sessions: list[CudaSession] = []
        self.watch = Watch(streams)
        self.answers: list[torch.Tensor] = []
        self._one_at_a_time = threading.Lock()
        self._run, self._numpy = CudaSession.run, torch.Tensor.numpy
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a device")
        # Functions, since a bound method would not receive the object that it is called on.
        monkeypatch.setattr(CudaSession, "run", lambda session, inputs: self._watched(session, inputs))  # noqa: PLW0108
        monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: self._read(tensor))  # noqa: PLW0108
        # Graphs need batches with content; tests/inference/test_cuda_graphs.py has them.
        monkeypatch.setattr(torch_backend, "record_graphs", lambda *_arguments: None)
        monkeypatch.setattr(torch.nn.Module, "_apply", apply)

    def _watched(self, session, inputs):
        # Modes are per thread, and only one thread at a time may enter a FakeTensorMode.
        with self._one_at_a_time:
            self.sessions.append(session)
            if isinstance(inputs, dict):
                inputs = {name: self._without_content(value) for name, value in inputs.items()}
            with self.mode, self.watch, WithoutGuards():
                return self._run(session, inputs)

    def _without_content(self, value):
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        return self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def _read(self, tensor):
        if not isinstance(tensor, FakeTensor):
            return self._numpy(tensor)
        if tensor.dtype == torch.int32:  # the batch's tokens, on the host
            return np.zeros(tuple(tensor.shape), np.int32)
        self.answers.append(tensor)
        return np.zeros(tuple(tensor.shape), np.float32)


@pytest.mark.parametrize(
    ("kind", "asked", "dtype"),
    [
        ("bert", "auto", torch.float16),
        ("bert", "bfloat16", torch.bfloat16),
        ("bert", "float32", torch.float32),
        ("mpnet", "auto", torch.float16),
        ("prompt-not-pooled", "auto", torch.float16),
        ("left-padding", "auto", torch.float16),
        ("static", "auto", torch.float16),
        ("routed", "auto", torch.float16),
    ],
)
def test_a_model_is_loaded_and_warmed_up_on_the_device(tiny, cuda, monkeypatch, tmp_path, kind, asked, dtype):  # noqa: F811
    folder = tiny(kind)
    exact = SentenceTransformer(str(folder), device="cpu").encode(["the fox"])
    machine = Machine(monkeypatch, cuda[1])
    monkeypatch.setattr(warm_up, "MEASURING_SECONDS", 0)
    with Moving(machine.mode):
        model = load(folder, device="cuda", dtype=asked, cache_folder=str(tmp_path))
    assert (model.info.device, model.info.dtype) == ("cuda", str(dtype).removeprefix("torch."))
    weights = model.exact._loaded().model  # type: ignore[attr-defined]
    for name, tensor in [*weights.named_parameters(), *weights.named_buffers()]:
        assert (type(tensor), tensor.device) == (FakeTensor, CUDA), name
        assert not tensor.is_floating_point() or tensor.dtype == dtype, name
    assert len({id(session._stream) for session in machine.sessions}) == 2
    watch = machine.watch
    assert (watch.waits, watch.outside) == ([], [])
    # A tokenizer that is not the service's own gives arrays of int64.
    tokens = torch.int32 if isinstance(model.preprocessor, RustTokenizer) else torch.int64
    assert set(watch.copies) == {("cuda", tokens), ("cpu", torch.float32)}
    assert {(one.device.type, one.dtype) for one in machine.answers} == {("cpu", torch.float32)}
    if dtype != torch.float32:
        # Computed on the CPU, from the weights in the files.
        vectors = normalize(model.exact.forward(alone(model, "the fox")))
        assert np.abs(vectors - normalize(exact)).max() < 1e-5


@pytest.mark.parametrize(("processes", "shares"), [(1, []), (2, [0.5]), (4, [0.25])])
def test_processes_on_one_device_share_its_memory(monkeypatch, processes, shares):
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    found: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _enabled: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    try:
        prepare_libraries("cuda:0", threads, processes)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert found == shares
