"""CUDA graphs with a stand-in: what is recorded are torch's operations, on tensors of the CPU."""

import contextlib
import gc
import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedding_service.inference.backends import cuda_graphs
from embedding_service.inference.backends.cuda_graphs import CudaGraphs, Shapes
from embedding_service.inference.backends.torch import CudaSession
from tests.inference.test_cuda_memory import Event, Stream
from tests.inference.tiny_models import LONGEST

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


def features(model: SentenceTransformer, texts: list[str]) -> dict[str, np.ndarray]:
    return {
        name: value.numpy()
        for name, value in model.preprocess(texts).items()
        if isinstance(value, torch.Tensor)
    }


def recording_session(model: SentenceTransformer, monkeypatch, *, worthwhile: bool = True) -> CudaSession:
    session = CudaSession(model)
    took = iter([2.0, 1.0 if worthwhile else 1.9] * 100)
    monkeypatch.setattr(cuda_graphs, "_seconds", lambda run, batch: (run(batch), next(took))[1])
    session.record_ahead(features(model, ["the fox"]), LONGEST, 32 * LONGEST)
    return session


@pytest.mark.parametrize("kind", ["bert", "mpnet", "left-padding"])
def test_graphs_give_the_vectors_of_encode(tiny, graphs, monkeypatch, kind):
    model = SentenceTransformer(str(tiny(kind)), device="cpu").eval()
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    session = recording_session(model, monkeypatch)
    words = "the quick brown fox jumps over a lazy dog " * 9
    for texts in (
        ["fox"],
        ["the fox", words],
        [words[:n] for n in range(3, 40, 4)],
        [words] * 5,
        ["fox", "a"],
    ):
        got = session.run(features(model, texts))
        assert np.abs(got - oracle.encode(texts)).max() < 1e-5
    assert sum(graph.replays for graph in graphs) > 5


def test_batches_of_one_shape_share_a_graph_and_keep_no_rows_of_the_last_one(tiny, graphs, monkeypatch):
    model = SentenceTransformer(str(tiny("bert")), device="cpu").eval()
    monkeypatch.setattr("embedding_service.inference.backends.torch.RECORDING_SECONDS", 0)
    session = recording_session(model, monkeypatch)
    first = session.run(features(model, ["fox dog lazy"] * 16))
    recorded = len(graphs)
    second = session.run(features(model, ["the", "a dog", *["the fox"] * 13]))
    third = session.run(features(model, ["fox dog lazy"] * 16))
    assert len(graphs) == recorded
    assert second.shape == (15, first.shape[1])
    assert np.array_equal(first, third)


def test_graphs_that_are_not_worthwhile_are_not_used(tiny, graphs, monkeypatch):
    model = SentenceTransformer(str(tiny("bert")), device="cpu").eval()
    session = recording_session(model, monkeypatch, worthwhile=False)
    replays = sum(graph.replays for graph in graphs)
    session.run(features(model, ["the fox"]))
    assert sum(graph.replays for graph in graphs) == replays


def test_graphs_are_not_used_if_padding_changes_the_vectors(tiny, graphs, monkeypatch, caplog):
    model = SentenceTransformer(str(tiny("bert")), device="cpu").eval()
    forward = CudaSession._forward

    def with_padding(session, placed):
        return forward(session, placed) * placed["input_ids"].shape[1]

    monkeypatch.setattr(CudaSession, "_forward", with_padding)
    session = recording_session(model, monkeypatch)
    assert session._graphs and session._graphs.max_tokens == 0
    assert "CUDA graphs change this model's vectors" in caplog.text


def test_a_batch_padded_on_the_left_or_with_a_prompt_is_launched_without_a_graph(tiny, graphs, monkeypatch):
    model = SentenceTransformer(str(tiny("bert")), device="cpu").eval()
    session = recording_session(model, monkeypatch)
    batch = features(model, ["the fox", "fox"])
    assert session._graphs.fit(batch)
    assert not session._graphs.fit(batch | {"prompt_length": 2})
    turned = {name: array[:, ::-1].copy() for name, array in batch.items()}
    assert not session._graphs.fit(turned)


def test_if_a_graph_cannot_be_recorded_the_kernels_are_launched_one_by_one(tiny, graphs, monkeypatch, caplog):
    model = SentenceTransformer(str(tiny("bert")), device="cpu").eval()

    def refuse(*_arguments, **_named):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with caplog.at_level(logging.WARNING):
        session = recording_session(model, monkeypatch, worthwhile=False)
    assert [record.getMessage() for record in caplog.records] == [
        "No CUDA graph for batches of 1 × 16 tokens, which are slower: "
        "operation not permitted when stream is capturing"
    ]
    assert session._graphs and session._graphs.max_tokens == 0
    expected = SentenceTransformer(str(tiny("bert")), device="cpu").encode(["the fox"])
    assert np.abs(session.run(features(model, ["the fox"])) - expected).max() < 1e-6
    assert gc.isenabled()


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


def test_the_padded_shape_is_what_a_graph_may_hold():
    names = ["input_ids", "attention_mask"]
    graphs = CudaGraphs(lambda _inputs: torch.empty(0), names, 64, torch.device("cpu"), None)
    graphs.max_tokens = 8192

    def fits(rows: int, width: int) -> bool:
        return graphs.fit(dict.fromkeys(names, np.ones((rows, width), np.int64)))

    assert fits(512, 16)
    assert fits(512, 3)
    # 2,730 texts of 3 tokens have 8,190, but would be padded to 3,072 × 16.
    assert not fits(513, 3)
    assert not fits(2730, 3)


def test_recording_ahead_ends_in_time(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(cuda_graphs.time, "monotonic", lambda: next(times))
    graphs = CudaGraphs(lambda _inputs: torch.empty(0), ["attention_mask"], 64, torch.device("cpu"), None)
    graphs.max_tokens = 1000
    recorded: list[tuple[int, int]] = []
    monkeypatch.setattr(CudaGraphs, "_record", lambda _graphs, shape: recorded.append(shape))
    graphs.record_ahead(3)
    assert recorded == [(1, 16), (1, 32), (2, 16)]
