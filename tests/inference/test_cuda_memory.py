"""Two streams in one device's memory: what each batch takes is counted on its stream.

Tensors lie on the CPU and are computed there, so that vectors are real; the device, its streams and its
memory are stand-ins. Only what is made on a stream counts, as with CUDA's allocator, not the weights.
"""

import contextlib
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedding_service.errors import StartupError
from embedding_service.inference import warm_up
from embedding_service.inference.backends import torch as torch_backend
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.model import Model
from embedding_service.inference.warm_up import batch_of
from tests.inference.running import load, request
from tests.inference.tiny_models import LONGEST, WORDS

pytestmark = pytest.mark.slow

BATCH_SIZE = 32


class Device:
    """A CUDA device with `total` bytes for batches."""

    def __init__(self) -> None:
        self.total = 1 << 40
        self.expected = np.empty(0, np.float32)
        self.live: Counter[object] = Counter()
        self.most = 0
        self.refused = 0
        self.emptied = 0
        self.on_allocation: Callable[[object], None] = lambda _stream: None
        self._lock = threading.RLock()
        self._here = threading.local()

    @contextlib.contextmanager
    def stream(self, stream):
        self._here.stream = stream
        with Counting(self, stream):
            yield

    def allocate(self, stream, storage) -> None:
        size = storage.nbytes()
        with self._lock:
            if sum(self.live.values()) + size > self.total:
                self.refused += 1
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes.\nSee above."
                )
            self.live[stream] += size
            self.most = max(self.most, sum(self.live.values()))
        weakref.finalize(storage, self._free, stream, size)
        self.on_allocation(stream)

    def _free(self, stream, size) -> None:
        with self._lock:
            self.live[stream] -= size

    def empty_cache(self) -> None:
        assert self.live[self._here.stream] == 0, "the batch that failed still holds memory"
        self.emptied += 1


class Counting(TorchDispatchMode):
    """Counts each tensor with its own memory that is made on a stream."""

    def __init__(self, device: Device, stream: object) -> None:
        super().__init__()
        self._device, self._stream = device, stream

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **named or {})
        old = {
            id(one.untyped_storage())
            for one in tree_leaves((arguments, named))
            if isinstance(one, torch.Tensor)
        }
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and id(one.untyped_storage()) not in old:
                self._device.allocate(self._stream, one.untyped_storage())
        return result


class Stream:
    device = torch.device("cpu")

    def wait_stream(self, _other) -> None:
        pass


class Event:
    def __init__(self, blocking) -> None:
        pass

    def record(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def device(tiny, monkeypatch):
    monkeypatch.setattr(warm_up, "MEASURING_SECONDS", 0)
    # In a thread of its own, which would take memory at any time.
    monkeypatch.setattr(torch_backend, "record_graphs", lambda *_arguments: None)
    device = Device()
    oracle = SentenceTransformer(str(tiny("bert")), device="cpu")
    device.expected = oracle.encode(long_texts(BATCH_SIZE + 1), normalize_embeddings=True)
    to, empty = torch.Tensor.to, torch.empty

    def move(tensor, *arguments, **named):
        if "cuda" not in str((arguments, named)):
            return to(tensor, *arguments, **named)
        _, dtype, _, _ = torch._C._nn._parse_to(*arguments, **named)
        return to(tensor, dtype or tensor.dtype, copy=True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a device")
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "empty_cache", device.empty_cache)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **named: empty(*shape, **named))  # noqa: PLW0108
    monkeypatch.setattr(SentenceTransformer, "device", property(lambda _model: torch.device("cuda:0")))
    return device


def long_texts(count: int) -> list[str]:
    """Distinct texts, each with more tokens than the model reads."""
    return [f"{WORDS[i % 20]} {WORDS[i // 20]} {'fox ' * LONGEST}" for i in range(count)]


def bytes_of(device: Device, model: Model, tokens: int) -> int:
    """The memory that a batch takes at its peak."""
    device.most = 0
    model.streams[0].forward(batch_of(model.preprocessor.prepare(long_texts(1), None, None), tokens))
    return device.most


def loaded(tiny, **settings) -> Model:
    return load(tiny("bert"), device="cuda", dtype="float32", batch_size=BATCH_SIZE, **settings)


@pytest.mark.parametrize("tokens", [1536, 768, 96, 48])
def test_the_budget_is_halved_until_the_batches_of_both_streams_fit_together(tiny, device, tokens):
    both = 2 * bytes_of(device, loaded(tiny), tokens)
    device.total = both
    assert loaded(tiny).info.max_batch_tokens == tokens
    assert device.emptied == device.refused
    device.total = both - 1
    if tokens > LONGEST:
        assert loaded(tiny).info.max_batch_tokens == max(LONGEST, tokens // 2)
    else:
        with pytest.raises(StartupError, match=r"^The device's memory does not hold one text .*lower it$"):
            loaded(tiny)
    assert device.emptied == device.refused > 0
    assert not any(device.live.values())


def test_too_little_memory_for_any_batch_fails_the_start(tiny, device):
    device.total = 100
    with pytest.raises(StartupError, match=r"^The device's memory does not hold one text .*lower it$"):
        loaded(tiny)


def test_a_batch_that_does_not_fit_is_halved_while_the_other_stream_runs(tiny, device):
    one, *many = long_texts(BATCH_SIZE + 1)
    expected = device.expected
    model = loaded(tiny)
    model.budget.tokens = model.info.max_batch_tokens
    token = bytes_of(device, model, LONGEST) // LONGEST
    batcher = Batcher(model, max_queued_tokens=1_000_000)
    first: list[object] = []
    held, go_on = threading.Event(), threading.Event()

    def hold_first(stream) -> None:
        first.append(stream)
        if stream is first[0] and not held.is_set() and device.live[stream] > 30 * token:
            held.set()
            assert go_on.wait(60)

    def submit(texts):
        outcome: queue.SimpleQueue = queue.SimpleQueue()
        batcher.submit([(0, request(texts))], lambda outcomes: outcome.put(dict(outcomes)[0]))
        return outcome

    device.on_allocation = hold_first
    lone = submit([one])
    assert held.wait(60)
    # Next to the batch of the held stream there is room for a quarter of a batch.
    device.total = device.live[first[0]] + 400 * token
    # Once for the batch and once for each half; then the budget is lower.
    for refused in (3, 3):
        assert np.abs(submit(many).get(timeout=60).vectors - expected[1:]).max() < 1e-5
        assert device.emptied == device.refused == refused
    assert lone.empty()
    go_on.set()
    assert np.abs(lone.get(timeout=60).vectors - expected[:1]).max() < 1e-5
    batcher.close("the end")
