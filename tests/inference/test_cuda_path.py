"""A batch's whole path on CUDA, on tensors that have a device, a shape and a format but no content.

FakeTensorMode refuses operations across devices and those that need a value which the device has yet to
compute. It cannot see timing or kernels. Streams, events and pinned memory are stand-ins.
"""

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedding_service.inference.backends.torch import CudaSession
from embedding_service.inference.own_preprocessing import tokenizer_facts
from embedding_service.inference.preprocessing import RustTokenizer
from embedding_service.inference.tokenized import Rows

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
# Operations for which the host must wait until the device has computed a value or a shape.
WAITING = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "unique", "equal"}


class WithoutGuards(TorchFunctionMode):
    """Calls operators directly, if a torch built for the CPU has no device guard for the method."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        tensor = arguments[0] if arguments else None
        if not isinstance(tensor, FakeTensor):
            return function(*arguments, **named)
        if function is torch.Tensor.__getitem__:
            return self._index(tensor, arguments[1])
        if function is torch.Tensor.contiguous:
            return aten.clone(tensor, memory_format=torch.contiguous_format)
        if function is torch.Tensor.copy_:
            return aten.copy_(*arguments, **named)
        if function is torch.Tensor.__invert__:
            return aten.bitwise_not(tensor)
        if function is torch.Tensor.float:
            return self._to(tensor, dtype=torch.float32)
        if function is torch.Tensor.to:
            for one in arguments[1:]:
                kinds = {torch.device: "device", torch.dtype: "dtype"}
                named |= {kinds[type(one)]: one} if type(one) in kinds else self._like(one)
            return self._to(tensor, **named)
        return function(*arguments, **named)

    @staticmethod
    def _like(one):
        return (
            {"device": one.device, "dtype": one.dtype} if isinstance(one, torch.Tensor) else {"device": one}
        )

    @staticmethod
    def _to(tensor, device=None, dtype=None, non_blocking=False):
        device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
        if (device, dtype) == (tensor.device, tensor.dtype):
            return tensor
        return aten._to_copy(tensor, device=device, dtype=dtype, non_blocking=non_blocking)

    @staticmethod
    def _index(tensor, index):
        index = index if isinstance(index, tuple) else (index,)
        skipped = tensor.dim() - sum(one is not None and one is not Ellipsis for one in index)
        axis = 0
        for place, one in enumerate(index):
            if isinstance(one, torch.Tensor):
                return aten.index(tensor, [*[None] * axis, *index[place:]])
            if isinstance(one, int):
                tensor = aten.select(tensor, axis, one)
                continue
            if one is None:
                tensor = aten.unsqueeze(tensor, axis)
            elif isinstance(one, slice):
                tensor = aten.slice(tensor, axis, one.start, one.stop, one.step or 1)
            axis += skipped if one is Ellipsis else 1
        return tensor


class Watch(TorchDispatchMode):
    """Records every operation with its stream, and which ones copy between host and device or wait."""

    def __init__(self, streams: list[str]) -> None:
        super().__init__()
        self._streams = streams
        self.on_device: Counter[str] = Counter()
        self.copies: list[tuple[str, torch.dtype]] = []
        self.waits: list[str] = []
        self.outside: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        result = operation(*arguments, **named)
        name = operation._overloadpacket.__name__
        inputs = [one for one in tree_leaves((arguments, named)) if isinstance(one, torch.Tensor)]
        outputs = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        places = {one.device.type for one in [*inputs, *outputs]}
        if name in WAITING:
            self.waits.append(name)
        if places == {"cpu", "cuda"} and name in ("_to_copy", "copy_"):
            self.copies.append((outputs[0].device.type, outputs[0].dtype))
            if not (named.get("non_blocking") or arguments[2:] == (True,)):
                self.waits.append(f"{name} to {outputs[0].device.type}")
        if "cuda" in places:
            self.on_device[name] += 1
            if not self._streams:
                self.outside.append(name)
        return result


class Stream:
    def wait_stream(self, other) -> None:
        assert other == "the default stream"


@pytest.fixture
def cuda(monkeypatch):
    """Streams, events and pinned memory that only record their use; returns the record."""
    said: list[str] = []
    streams: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream) -> None:
            assert isinstance(stream, Stream)
            said.append("record")

        def synchronize(self) -> None:
            assert not streams, "waits for the event, not on its stream"
            said.append("synchronize")

    @contextlib.contextmanager
    def stream(_one):
        streams.append("own")
        yield
        streams.pop()

    empty = torch.empty

    def empty_and_say(*shape, pin_memory=False, **named):
        if pin_memory:
            said.append("pin")
        return empty(*shape, **named)

    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "the default stream")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: said.append("pin") or tensor)
    monkeypatch.setattr(torch, "empty", empty_and_say)
    return said, streams


def fake_on_cuda(model: SentenceTransformer, mode: FakeTensorMode) -> None:
    """Put every parameter and buffer on a device that does not exist."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = FakeTensor(mode, torch.empty_like(tensor, device="meta"), CUDA)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake, requires_grad=False) if is_weight else fake


def features(model: SentenceTransformer, texts: list[str]) -> dict[str, np.ndarray]:
    made = model.preprocess(texts)
    return {name: value.numpy() for name, value in made.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("texts", [["a b c"] * 4, ["a", "a b c d e"]], ids=["no padding", "padding"])
def test_a_batch_stays_on_the_device_and_waits_once(model_folder, cuda, monkeypatch, dtype, texts):
    said, streams = cuda
    model = SentenceTransformer(str(model_folder), device="cpu", model_kwargs={"dtype": dtype}).eval()
    tokenizer = RustTokenizer(tokenizer_facts(model, 256, list(features(model, texts))))
    batch = tokenizer.pack_unpadded([Rows.all_of(tokenizer.prepare(texts))])
    mode = FakeTensorMode()
    fake_on_cuda(model, mode)
    returned: list[torch.Tensor] = []

    def numpy(tensor):
        if tensor.dtype == torch.int32:  # the batch's tokens, on the host
            return np.zeros(tuple(tensor.shape), np.int32)
        assert said[-1] == "synchronize", "the vectors are read before they are there"
        returned.append(tensor)
        return np.zeros(tuple(tensor.shape), np.float32)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    session = CudaSession(model)
    with mode, Watch(streams) as watch, WithoutGuards():
        vectors = session.run(batch)
    assert vectors.shape == (len(texts), 384)
    assert (returned[0].device.type, returned[0].dtype) == ("cpu", torch.float32)
    assert watch.on_device["linear"] + watch.on_device["addmm"] + watch.on_device["mm"] > 30
    assert watch.outside == []
    assert watch.waits == []
    assert watch.copies == [("cuda", torch.int32), ("cpu", torch.float32)]
    # For the tokens and the vectors: the host has to wait for copies from or to other memory.
    assert said == ["pin", "pin", "record", "synchronize"]


def test_a_weight_left_on_the_host_is_found(model_folder, cuda, monkeypatch):
    _, streams = cuda
    model = SentenceTransformer(str(model_folder), device="cpu").eval()
    inputs = features(model, ["a b c"])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    [last] = [one for name, one in model.named_modules() if name.endswith("encoder.layer.5.output.dense")]
    left = last.weight
    fake_on_cuda(model, mode)
    last.weight = left
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: mode.from_tensor(from_numpy(array)))
    with pytest.raises(RuntimeError, match="device"), mode, Watch(streams), WithoutGuards():
        CudaSession(model).run(inputs)


def test_the_host_waits_for_a_single_value_whether_there_is_padding(model_folder):
    """transformers calls `padding_mask.all()`, but not for fake tensors: docs/decisions/0002-cuda.md."""
    model = SentenceTransformer(str(model_folder), device="cpu").eval()
    inputs = {name: torch.from_numpy(one) for name, one in features(model, ["a", "a b c d e"]).items()}
    seen = Watch(["own"])
    with seen, torch.inference_mode():
        model(inputs)
    assert seen.waits == ["is_nonzero"]
