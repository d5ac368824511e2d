"""The forward pass in OpenVINO, without torch: the whole model, from token ids to vectors, on an x86 CPU."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Backend, Session
from embedding_service.inference.memory import release

log = logging.getLogger(__name__)

# Activations are quantised at run time in groups of this many values; smaller groups cost time,
# larger ones accuracy (docs/decisions/0004-int8.md).
QUANTIZATION_GROUP = 64

GRAPH = "model.xml"

# How long nothing must have run before scratch memory is given back. The next batch allocates it again.
IDLE_SECONDS = 2.0

# How long no batch must have been alone before the copy of the weights that such batches use is given back.
ALONE_SECONDS = 60.0

# The input of a graph whose pooling leaves the prompt out: the attention mask without the prompt.
POOLED_MASK = "pooled_mask"


def read_graph(folder: Path) -> openvino.Model:
    """The graph in a folder, whose weights stay in the file. Raises RuntimeError."""
    return openvino.Core().read_model(folder / GRAPH)


def write_graph(graph: openvino.Model, folder: Path) -> None:
    """Put a graph into a folder. Raises RuntimeError."""
    openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)


def openvino_backend(graph: openvino.Model, *, dtype: str, threads: int) -> Backend:
    """Compile a graph for several batches at once, each on a core of its own (docs/decisions/0006).

    Cores that share a batch wait for one another at every layer, and wait long if a web worker takes one of
    them away. But they are fastest for a batch alone, for which the graph is compiled again once that pays.
    """
    scratch = Scratch()
    compiled, seconds = _compile(graph, threads, threads, dtype, scratch)
    sessions: list[Session] = [OpenVINOSession(compiled, scratch) for _ in range(threads)]
    all_cores = None
    if threads > 1:
        lost = 1 - 1 / threads
        all_cores = scratch.all_cores = AllCoresSession(
            OpenVINOSession(compiled, scratch),
            lambda: OpenVINOSession(_compile(graph, 1, threads, dtype, scratch)[0], scratch),
            seconds / lost,
        )
    return Backend(
        name="openvino",
        version=openvino.__version__,
        sessions=sessions,
        all_cores=all_cores,
        rest=scratch.rest,
    )


class Scratch:
    """What batches allocate: it grows with the largest of them, and is given back once nothing runs."""

    def __init__(self) -> None:
        # The graph as all streams run it, and while it is compiled again, as all cores run it.
        self.compiled: list[openvino.CompiledModel] = []
        self.all_cores: AllCoresSession | None = None
        self._used_at: float | None = None

    def used(self) -> None:
        """A batch has run."""
        self._used_at = time.monotonic()

    def rest(self) -> None:
        """Give it back if nothing has run for a while. Called from time to time."""
        if self.all_cores is not None and self.all_cores.end_if_unused():
            del self.compiled[1:]
            release()
        if self._used_at is None or time.monotonic() - self._used_at < IDLE_SECONDS:
            return
        self._used_at = None
        for compiled in self.compiled:
            # OpenVINO refuses while a batch runs, which has just begun.
            with contextlib.suppress(RuntimeError):
                compiled.release_memory()
        release()


class OpenVINOSession:
    """One infer request of a compiled graph."""

    def __init__(self, compiled: openvino.CompiledModel, scratch: Scratch) -> None:
        self._used = scratch.used
        self._request = compiled.create_infer_request()
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._leaves_prompt_out = POOLED_MASK in self._names

    def run(self, features: dict[str, Any]) -> Vectors:
        if self._leaves_prompt_out:
            pooled = features["attention_mask"].copy()
            pooled[:, : features.get("prompt_length", 0)] = 0
            features = {**features, POOLED_MASK: pooled}
        vectors: Vectors = self._request.infer({name: features[name] for name in self._names})[0]
        self._used()
        return vectors


class AllCoresSession:
    """Runs batches that are alone: on one core at first, then on all of them.

    A graph that is compiled again holds the weights again. So that happens once the batches that ran on one
    core have lost as much time as compiling takes, and beside them: a start does not wait for it, and a
    service that is never asked for a text alone keeps one copy of the weights, as does one that is not asked
    for a while.
    """

    def __init__(
        self, one_core: OpenVINOSession, compile_again: Callable[[], OpenVINOSession], seconds: float
    ) -> None:
        """Compile again after batches that took this many `seconds`."""
        self._one_core = self._session = one_core
        self._compile_again = compile_again
        self._seconds = self._seconds_left = seconds
        self._used_at = 0.0

    def run(self, features: dict[str, Any]) -> Vectors:
        began = time.perf_counter()
        vectors = self._session.run(features)
        self._used_at = time.monotonic()
        if self._seconds_left > 0:
            self._seconds_left -= time.perf_counter() - began
            if self._seconds_left <= 0:
                threading.Thread(target=self._change, args=[features], name="compile", daemon=True).start()
        return vectors

    def end_if_unused(self) -> bool:
        """Run on one core again if no batch has been alone for a while; whether it does so from now on."""
        if self._session is self._one_core or time.monotonic() - self._used_at < ALONE_SECONDS:
            return False
        self._session, self._seconds_left = self._one_core, self._seconds
        return True

    def _change(self, features: dict[str, Any]) -> None:
        try:
            session = self._compile_again()
            # Kernels are made in the first run.
            session.run(features)
        except Exception as error:
            log.warning("Texts alone run on one core: the model could not be compiled for all: %s", error)
            return
        self._session = session
        release()


def _compile(
    graph: openvino.Model, streams: int, threads: int, dtype: str, scratch: Scratch
) -> tuple[openvino.CompiledModel, float]:
    """A graph for this many batches at once, and how long compiling it took."""
    settings = {
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        # Each of several model processes, or services, would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": "NO",
        # In float32 not a bit is given away.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(QUANTIZATION_GROUP if dtype == "int8" else 0),
    }
    began = time.perf_counter()
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    scratch.compiled.append(compiled)
    return compiled, time.perf_counter() - began
