"""CUDA graphs with a stand-in: what is recorded are torch's operations, on tensors of the CPU."""

import contextlib
import dataclasses
import gc
import itertools
import logging
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedding_service.inference.backends import cuda_graphs
from embedding_service.inference.backends import torch as torch_backend
from embedding_service.inference.backends.cuda_graphs import CudaGraphs, Shapes, model_input
from embedding_service.inference.backends.torch import CudaSession
from embedding_service.inference.own_preprocessing import tokenizer_facts
from embedding_service.inference.preprocessing import RustTokenizer, Unpadded
from embedding_service.inference.runtime import DeviceLost
from embedding_service.inference.tokenized import Rows
from tests.inference.test_cuda_memory import Event, Stream
from tests.inference.tiny_models import LONGEST
from tests.service import wait_until

pytestmark = pytest.mark.slow


class Graph(TorchDispatchMode):
    """Repeats the operations of a pass on the memory that they used, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._operations: list[tuple] = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        assert operation._overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero"), "waits"
        result = operation(*arguments, **named or {})
        self._operations.append((operation, arguments, named or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for operation, arguments, named, result in self._operations:
            again = operation(*arguments, **named)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were recorded, on a device that is the CPU."""
    made: list[Graph] = []

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    @contextlib.contextmanager
    def record(graph, *, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        assert not gc.isenabled(), "the collector may free another graph, which spoils this one"
        with graph:
            yield

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", record)
    # As transformers asks whether it is recorded; then it may not look at values.
    capturing = torch.utils._python_dispatch._get_current_dispatch_mode
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: isinstance(capturing(), Graph))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    # Memory of its own, as a copy on another device has.
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: to(tensor, *a, **k).clone())
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **named: empty(*shape, **named))  # noqa: PLW0108
    return made


def packer(model: SentenceTransformer) -> Callable[..., Unpadded]:
    """Packs texts like the service."""
    inputs = [name for name, value in model.preprocess(["a"]).items() if isinstance(value, torch.Tensor)]
    tokenizer = RustTokenizer(tokenizer_facts(model, LONGEST, inputs))
    return lambda *texts: tokenizer.pack_unpadded([Rows.all_of(tokenizer.prepare(texts))])


class Service:
    """A model with sessions that serve while a thread records their graphs."""

    def __init__(self, folder, monkeypatch, *, worthwhile=True, sessions=1, seconds=60.0) -> None:
        self.model = SentenceTransformer(str(folder), device="cpu").eval()
        self.pack = packer(self.model)
        self.sessions = [CudaSession(self.model) for _ in range(sessions)]
        took = itertools.cycle([1.0 if worthwhile else 1.9, 2.0])
        monkeypatch.setattr(cuda_graphs, "_seconds", lambda run, *call: (run(*call), next(took))[1])
        monkeypatch.setattr(torch_backend, "RECORDING_SECONDS", seconds)
        self.wanted: queue.SimpleQueue = queue.SimpleQueue()
        arguments = (self.sessions, self.pack("the fox"), LONGEST, 8 * LONGEST, self.wanted)
        self._thread = threading.Thread(target=torch_backend.record_graphs, args=arguments)
        self._thread.start()

    def recorded(self) -> CudaSession:
        """The first session, once everything that was wanted is recorded and nothing else will be."""
        self.wanted.put(None)
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.sessions[0]

    def embed(self, *texts: str) -> np.ndarray:
        return self.sessions[0].run(self.pack(*texts))


LONG = "the quick brown fox jumps over a lazy dog " * 9
BATCHES = (["fox"], ["the fox", LONG], [LONG[:n] for n in range(3, 40, 4)], [LONG] * 5, ["fox", "a"])


@pytest.mark.parametrize("kind", ["bert", "mpnet", "left-padding"])
def test_graphs_give_the_vectors_of_encode(tiny, graphs, monkeypatch, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    service = Service(tiny(kind), monkeypatch, sessions=2)
    service.recorded()
    assert [len(session.graphs) for session in service.sessions] == [
        len(Shapes(LONGEST).up_to(8 * LONGEST))
    ] * 2
    for session in service.sessions:
        for texts in BATCHES:
            before = sum(graph.replays for graph in graphs)
            got = session.run(service.pack(*texts))
            assert np.abs(got - oracle.encode(texts)).max() < 1e-5
            assert sum(graph.replays for graph in graphs) == before + 1


@pytest.mark.parametrize("kind", ["bert", "left-padding"])
def test_until_graphs_are_recorded_batches_are_launched_kernel_by_kernel(tiny, graphs, monkeypatch, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    may_record = threading.Event()

    def serve(session, own, shape):
        # Not in the session's turn, which the batches need.
        assert may_record.wait(120)
        record_in_turn(session, own, shape)

    record_in_turn = CudaSession.record
    monkeypatch.setattr(CudaSession, "record", serve)
    service = Service(tiny(kind), monkeypatch)
    for texts in BATCHES:
        assert np.abs(service.embed(*texts) - oracle.encode(texts)).max() < 1e-5
    assert not graphs
    may_record.set()
    service.recorded()
    replays = sum(graph.replays for graph in graphs)
    for texts in BATCHES:
        assert np.abs(service.embed(*texts) - oracle.encode(texts)).max() < 1e-5
    assert sum(graph.replays for graph in graphs) == replays + len(BATCHES)


def test_batches_are_right_while_graphs_are_recorded(tiny, graphs, monkeypatch):
    oracle = SentenceTransformer(str(tiny("bert")), device="cpu")
    expected = [oracle.encode(texts) for texts in BATCHES]
    service = Service(tiny("bert"), monkeypatch, sessions=2)

    def serve(session):
        return [[session.run(service.pack(*texts)) for texts in BATCHES] for _ in range(10)]

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(serve, service.sessions))
    service.recorded()
    for rounds in answers:
        for turn in rounds:
            for got, right in zip(turn, expected, strict=True):
                assert np.abs(got - right).max() < 1e-5


def test_a_shape_that_was_not_recorded_ahead_is_recorded_once_it_has_occurred(tiny, graphs, monkeypatch):
    service = Service(tiny("bert"), monkeypatch, seconds=-1)
    wait_until(lambda: service.sessions[0].graphs is not None, "the limit")
    texts = ["fox dog lazy"] * 5
    recorded = len(graphs)
    first = service.embed(*texts)
    service.embed(*texts)
    service.recorded()
    assert len(graphs) == recorded + 1
    replays = graphs[-1].replays
    assert np.abs(service.embed(*texts) - first).max() < 1e-6
    assert graphs[-1].replays == replays + 1


def test_batches_of_one_shape_share_a_graph_and_keep_no_rows_of_the_last_one(tiny, graphs, monkeypatch):
    service = Service(tiny("bert"), monkeypatch)
    service.recorded()
    recorded = len(graphs)
    first = service.embed(*["fox dog lazy"] * 16)
    second = service.embed("the", "a dog", *["the fox"] * 13)
    third = service.embed(*["fox dog lazy"] * 16)
    assert len(graphs) == recorded
    assert second.shape == (15, first.shape[1])
    assert np.array_equal(first, third)


def test_graphs_that_are_not_worthwhile_are_not_used(tiny, graphs, monkeypatch):
    service = Service(tiny("bert"), monkeypatch, worthwhile=False)
    assert service.recorded().graphs.max_tokens == 0
    replays = sum(graph.replays for graph in graphs)
    service.embed("the fox")
    assert sum(graph.replays for graph in graphs) == replays


def test_graphs_are_not_used_if_padding_changes_the_vectors(tiny, graphs, monkeypatch, caplog):
    forward = CudaSession._forward

    def with_padding(session, placed):
        return forward(session, placed) * placed["input_ids"].shape[1]

    monkeypatch.setattr(CudaSession, "_forward", with_padding)
    service = Service(tiny("bert"), monkeypatch)
    assert service.recorded().graphs.max_tokens == 0
    assert "CUDA graphs change this model's vectors" in caplog.text


def test_a_lost_device_ends_the_recording_and_not_the_process(tiny, graphs, monkeypatch, caplog):
    def lose(*_arguments, **_named):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(CudaSession, "_forward", lose)
    service = Service(tiny("bert"), monkeypatch)
    assert service.recorded().graphs is None
    assert "CUDA graphs are not used, which is slower: the cpu device failed" in caplog.text
    with pytest.raises(DeviceLost):
        service.embed("the fox")


def test_a_batch_with_a_prompt_that_is_not_pooled_is_launched_without_a_graph(tiny, graphs, monkeypatch):
    service = Service(tiny("bert"), monkeypatch)
    session = service.recorded()
    batch = service.pack("the fox", "fox")
    with torch.inference_mode():
        assert session.graphs.launch(batch) is not None
        assert session.graphs.launch(dataclasses.replace(batch, prompt_length=2)) is None


def test_if_a_graph_cannot_be_recorded_the_kernels_are_launched_one_by_one(tiny, graphs, monkeypatch, caplog):
    def refuse(*_arguments, **_named):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with caplog.at_level(logging.WARNING):
        service = Service(tiny("bert"), monkeypatch, worthwhile=False)
        session = service.recorded()
    assert [record.getMessage() for record in caplog.records] == [
        f"No CUDA graph for batches of {rows} × 16 tokens, which are slower: "
        "operation not permitted when stream is capturing"
        for rows in (2, 1)
    ]
    assert session.graphs.max_tokens == 0
    expected = SentenceTransformer(str(tiny("bert")), device="cpu").encode(["the fox"])
    assert np.abs(service.embed("the fox") - expected).max() < 1e-6
    assert gc.isenabled()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("type_ids", [False, True])
def test_what_the_device_makes_of_unpadded_tokens_is_what_the_tokenizer_packs(tiny, left, type_ids):
    model = SentenceTransformer(str(tiny("bert")), device="cpu")
    inputs = ["input_ids", "attention_mask", *["token_type_ids"] * type_ids]
    facts = msgspec.structs.replace(tokenizer_facts(model, LONGEST, inputs), pads_left=left, pad_id=3)
    tokenizer = RustTokenizer(facts)
    source = random.Random(0)
    for count in (1, 2, 17):
        parts = [tokenizer.prepare([LONG[: source.randint(1, 99)] for _ in range(count)]) for _ in range(3)]
        orders = [np.array(source.sample(range(count), count), np.int32), np.arange(count, dtype=np.int32)]
        batch = [Rows(part, order) for part, order in itertools.product(parts, orders)]
        unpadded = tokenizer.pack_unpadded(batch)
        rows = len(unpadded.lengths)
        room = np.full(2 * rows + rows * unpadded.width, 5, np.int32)
        # As if the batch had been padded with rows, which a graph's shape may have.
        more = rows + 3
        used = unpadded.write(room, more)
        assert used == more + unpadded.lengths.sum()
        made = model_input(torch.from_numpy(room), more, unpadded.width, facts, left=left)
        packed = tokenizer.pack(batch)
        assert list(made) == list(packed)
        for name, array in packed.items():
            assert made[name].dtype == torch.int64
            assert np.array_equal(made[name][:rows].numpy(), array)
        assert (made["attention_mask"].sum(1)[rows:] == 1).all()


def test_shapes_grow_by_at_most_a_quarter_and_never_beyond_the_longest_text():
    shapes = Shapes(250)
    assert [shapes.around(rows, 1)[0] for rows in (1, 5, 8, 9, 11, 17, 100)] == [1, 5, 8, 10, 12, 20, 112]
    assert [shapes.around(1, width)[1] for width in (1, 16, 17, 65, 129, 200, 249)] == [
        16, 16, 32, 80, 160, 224, 250,
    ]  # fmt: skip
    known = shapes.up_to(2000)
    assert known == sorted(known, key=lambda shape: shape[0] * shape[1])
    around = {shapes.around(rows, width) for rows in range(1, 200) for width in range(1, 251)}
    assert known == sorted(
        (shape for shape in around if shape[0] * shape[1] <= 2000),
        key=lambda shape: (shape[0] * shape[1], shape),
    )


def test_the_padded_shape_is_what_a_graph_may_hold(tiny):
    model = SentenceTransformer(str(tiny("bert")), device="cpu")
    example = packer(model)("fox")
    wanted: list[tuple[int, int]] = []
    graphs = CudaGraphs(lambda _inputs: torch.empty(0), example.facts, 64, None, wanted.append)
    graphs.max_tokens = 8192

    def fits(rows: int, width: int) -> bool:
        wanted.clear()
        batch = dataclasses.replace(example, lengths=np.full(rows, width, np.int32), width=width)
        assert graphs.launch(batch) is None
        return bool(wanted)

    assert fits(512, 16)
    assert fits(448, 3)
    # 2,730 texts of 3 tokens have 8,190, but would be padded to 3,072 × 16.
    assert not fits(513, 3)
    assert not fits(2730, 3)
