"""Gauges that change without an event to count: the queue, and the GPU as the driver sees it."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from embedding_service.inference.batcher import Batcher
from embedding_service.observability import metrics

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 1.0


class Gpu:
    """One NVIDIA GPU, asked through NVML; it needs no CUDA context."""

    def __init__(self, uuid: str, name: str) -> None:
        """Raises ImportError without nvidia-ml-py, and pynvml.NVMLError without a driver."""
        import pynvml

        self._nvml: Any = pynvml
        self._name = name
        pynvml.nvmlInit()
        # By its UUID, since CUDA_VISIBLE_DEVICES gives CUDA other numbers than NVML has.
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def sample(self) -> None:
        """Set the gauges. A figure that the driver does not know (of a MIG slice, say) is left out."""
        nvml, handle = self._nvml, self._handle
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is not None:
            metrics.GPU_MEMORY_USED.labels(self._name).set(memory.used)
            metrics.GPU_MEMORY_TOTAL.labels(self._name).set(memory.total)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        if rates is not None:
            metrics.GPU_UTILIZATION.labels(self._name).set(rates.gpu / 100)
        degrees = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        if degrees is not None:
            metrics.GPU_TEMPERATURE.labels(self._name).set(degrees)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None


def find_gpu(device: str) -> Gpu | None:
    """The GPU of a torch device such as cuda:1; None for other devices, and where NVML is not there."""
    if not device.startswith("cuda"):
        return None
    import torch

    index = torch.device(device).index or 0
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    try:
        return Gpu(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}", f"cuda:{index}")
    except Exception as error:
        log.warning("No metrics of %s, since NVML does not answer: %s", device, error)
        return None


class Sampler:
    """A thread that sets the gauges once a second until it is closed."""

    def __init__(self, batcher: Batcher, gpu: Gpu | None) -> None:
        self._batcher = batcher
        self._gpu = gpu
        self._closed = threading.Event()
        threading.Thread(target=self._sample_forever, name="sampler", daemon=True).start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _sample_forever(self) -> None:
        while True:
            metrics.QUEUED_TOKENS.set(self._batcher.queued_tokens)
            waiting, running = self._batcher.requests
            metrics.REQUESTS_WAITING.set(waiting)
            metrics.REQUESTS_RUNNING.set(running)
            if self._gpu is not None:
                self._gpu.sample()
            if self._closed.wait(SAMPLE_SECONDS):
                return
