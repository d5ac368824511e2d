"""Load a SentenceTransformer, tokenise for it, and run one batch on it."""

import hashlib
import importlib.util
import json
import logging
import os
import platform
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer

from embedding_service.engine import ModelInfo, TokenizedText, Vectors
from embedding_service.errors import InvalidRequest, StartupError
from embedding_service.inference import source
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.torch import TorchBackend
from embedding_service.inference.cores import available_cores
from embedding_service.inference.runtime import OutOfMemory, Tokens
from embedding_service.inference.settings import ModelSettings
from embedding_service.inference.tokenizer import FastTokenizer, TokenLister

log = logging.getLogger(__name__)

# What one more batch costs, in tokens of padding: below it, padding is cheaper than a batch apart.
CPU_FREE_PADDING, GPU_FREE_PADDING = 16, 2048

# Texts that show whether our tokenisation equals the model's own: case, space, other scripts, emoji.
PROBES = [
    "Hello World",
    "  two  spaces\tand a tab \n",
    "",
    "ÀÉÎ straße Ünïcödé ﬁ İstanbul",
    "東京 한국어 مرحبا שלום 👩‍👩‍👧 \u200b\ufeff",
    "a" * 300,
    "one two three four five six seven eight nine ten " * 8,
]

# What tokenizers write for a maximum that they do not know.
NO_LIMIT = 1_000_000

# int8 is what OpenVINO makes of float32.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}

# How far a converted model may be from torch, as a share of the largest number in the vectors.
CONVERSION_TOLERANCE = {"float32": 1e-4, "int8": 0.3}


class Model:
    """A loaded SentenceTransformer with its tokenizer and backend: the Runtime of a batcher."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load, check and warm up. Raises StartupError with a line a person can act on."""
        began = time.monotonic()
        found = source.resolve(settings.embedding_model, settings.model_revision)
        device = choose_device(settings.device, settings.cpu_fallback)
        dtype = "float16" if device.startswith("cuda") else "float32"
        dtype = dtype if settings.dtype == "auto" else settings.dtype
        self._folder = found.folder
        self._weights = source.sha256_of_weights(found.folder)
        self._threads = max(1, available_cores() // settings.model_processes)
        _prepare(device, self._threads)
        self._model = _load(found.folder, device, dtype, settings.attn_implementation)
        self.max_seq_length = _limit_length(self._model, settings.max_seq_length)
        self._prompts: dict[str, str] = {
            name: text for name, text in self._model.prompts.items() if text is not None
        }
        self._pooling = next((m for m in self._model if isinstance(m, Pooling)), None)
        self._tokenizer = FastTokenizer.build(self._model, self.max_seq_length, self._probes())
        self._lister: TokenLister | None = None
        self._backend = self._choose_backend(settings, device, dtype)
        self._exact: TorchBackend | None = None

        self.lanes = self._backend.lanes
        on_cpu = device == "cpu"
        full = settings.batch_size * self.max_seq_length
        self.max_batch_tokens = min(full, self._backend.cpu_batch_tokens) if on_cpu else full
        self.free_padding_tokens = CPU_FREE_PADDING if on_cpu else GPU_FREE_PADDING
        self.separate_bulk = on_cpu
        last = list(self._model)[-1]
        self.normalized = isinstance(last, Normalize) and DTYPES[dtype] == torch.float32
        dimension = self._warm_up()
        self.info = ModelInfo(
            model_name=settings.embedding_model,
            origin=found.origin,
            revision=found.revision,
            embedding_dimension=dimension,
            max_seq_length=self.max_seq_length,
            device=device,
            dtype=dtype,
            backend=self._backend.name,
            pooling=_pooling_name(self._pooling),
            prompts=self._prompts,
            batch_size=settings.batch_size,
            max_batch_tokens=self.max_batch_tokens,
            fingerprint=self._fingerprint(dtype),
        )
        log.info(
            "Loaded %s (%s) on %s: %s, %s, %d dimensions, %d tokens, threads: %d, in %.1f s",
            settings.embedding_model,
            found.origin,
            device,
            self._backend.name,
            dtype,
            dimension,
            self.max_seq_length,
            self._threads,
            time.monotonic() - began,
        )

    def prompt(self, prompt_name: str | None, input_type: Literal["query", "document"] | None) -> str | None:
        """The prompt as SentenceTransformer.encode, encode_query and encode_document choose it."""
        if prompt_name is not None:
            if prompt_name not in self._prompts:
                known = ", ".join(sorted(self._prompts)) or "none"
                raise InvalidRequest(
                    f"is {prompt_name!r}; the model's prompts are: {known}", field="prompt_name"
                )
            return self._prompts[prompt_name]
        names = {"query": ["query"], "document": ["document", "passage", "corpus"], None: []}
        for name in names[input_type]:
            if name in self._prompts:
                return self._prompts[name]
        default = self._model.default_prompt_name
        return self._prompts.get(default) if default is not None else None

    def tokenize(
        self,
        texts: Sequence[str],
        prompt: str | None,
        task: str | None,
        side: Literal["left", "right"] | None = None,
    ) -> list[Tokens]:
        if self._tokenizer is None:
            if side == "left":
                raise InvalidRequest(
                    "cannot be chosen: this model cuts its texts itself", field="truncation_side"
                )
            return [self._measure(text, prompt, task) for text in _checked(texts)]
        group: Hashable = None
        if prompt and self._pooling is not None and not self._pooling.include_prompt:
            group = self._model[0]._get_prompt_length(prompt)
        prefixed = [prompt + text for text in texts] if prompt else texts
        try:
            return self._tokenizer.tokenize(prefixed, group, side)
        except TypeError:
            _checked(texts)
            raise

    def list_tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        if self._lister is None:
            self._lister = TokenLister(self._model)
        return self._lister.list(_checked(texts), add_special_tokens)

    def forward(self, batch: Sequence[Tokens], lane: int = 0, alone: bool = True) -> Vectors:
        return self._backend.forward(self._features(batch), lane, alone)

    def forward_exact(self, tokens: Tokens) -> Vectors:
        if self._exact is None:
            model = self._model
            if model.dtype not in (None, torch.float32):
                # From the files and on the CPU: the rounded weights are not the model's own, the
                # device may have no room for a second model, and flash attention knows no float32.
                model = _load(self._folder, "cpu", "float32", None)
                _limit_length(model, self.max_seq_length)
            self._exact = TorchBackend(model)
        if tokens.ids is None:
            return self._exact.forward(self._preprocessed(self._exact.model, [tokens]))
        return self._exact.forward(self._features([tokens]))

    def _features(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        if self._tokenizer is None:
            return self._preprocessed(self._model, batch)
        features = self._tokenizer.pack(batch)
        if batch[0].group is not None:
            features["prompt_length"] = batch[0].group
        return features

    def _preprocessed(self, model: SentenceTransformer, batch: Sequence[Tokens]) -> dict[str, Any]:
        """What the model's own `preprocess` makes of the texts: padded, or flat for flash attention."""
        group = batch[0].group
        assert isinstance(group, tuple)
        prompt, task = group
        extra = {"task": task} if task and self._routed else {}
        features = model.preprocess([tokens.text for tokens in batch], prompt=prompt, **extra)
        return {**features, **extra}

    @property
    def _routed(self) -> bool:
        return not isinstance(self._model[0], Transformer)

    def _measure(self, text: str, prompt: str | None, task: str | None) -> Tokens:
        """A text for a model that tokenises for itself: counted as well as its tokenizer allows."""
        full = (prompt or "") + text
        length = max(1, len(full) // 4)
        tokenizer = getattr(self._model[0], "tokenizer", None)
        if isinstance(tokenizer, Tokenizer):  # as StaticEmbedding has it
            length = max(1, len(tokenizer.encode(full, add_special_tokens=False).ids))
        elif tokenizer is not None and hasattr(tokenizer, "encode"):
            length = max(1, len(tokenizer.encode(full, verbose=False)))
        truncated = self._cuts and length > self.max_seq_length
        return Tokens(
            ids=None,
            length=self.max_seq_length if truncated else length,
            truncated=truncated,
            group=(prompt, task if self._routed else None),
            text=text,
        )

    @property
    def _cuts(self) -> bool:
        """Whether the model cuts long texts at all; one of static embeddings reads them whole."""
        own = self._model.max_seq_length
        return own is not None and own < NO_LIMIT

    def _probes(self) -> list[str]:
        return [prompt + text for prompt in {"", *self._prompts.values()} for text in PROBES]

    def _choose_backend(self, settings: ModelSettings, device: str, dtype: str) -> Backend:
        wanted, int8 = settings.backend, dtype == "int8"
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        installed = importlib.util.find_spec("openvino") is not None
        possible = device == "cpu" and dtype in CONVERSION_TOLERANCE and self._tokenizer is not None
        if int8 and (wanted == "torch" or not (possible and installed)):
            raise StartupError(
                "DTYPE=int8 needs OpenVINO, DEVICE=cpu and a transformer with a fast tokenizer"
            )
        if wanted == "openvino" and not possible:
            raise StartupError(
                "BACKEND=openvino needs DEVICE=cpu, DTYPE=float32 or int8, and a transformer with a fast "
                "tokenizer"
            )
        asked = wanted == "openvino" or int8
        if not asked and (wanted == "torch" or not possible or not (installed and x86)):
            return TorchBackend(self._model)
        try:
            return self._convert(settings, dtype)
        except ModuleNotFoundError as error:
            if int8 and error.name == "nncf":
                raise StartupError("DTYPE=int8 needs nncf: pip install -r requirements-int8.txt") from None
            raise StartupError(f"BACKEND=openvino: {error}; pip install -r requirements.txt") from None
        except Exception as error:
            if asked:
                line = " ".join(str(error).split())[:300]
                raise StartupError(f"OpenVINO cannot run this model: {line}") from error
            log.warning("OpenVINO cannot run this model, using torch: %s", error)
            return TorchBackend(self._model)

    def _convert(self, settings: ModelSettings, dtype: str) -> Backend:
        """The model in OpenVINO, from the cache if it is there. Raises where it answers otherwise."""
        import openvino

        from embedding_service.inference.backends.graph_cache import GraphCache
        from embedding_service.inference.backends.openvino import GRAPH_FORM, OpenVINOBackend

        cache = None
        if settings.cache_folder:
            versions = [GRAPH_FORM, openvino.__version__, torch.__version__, transformers.__version__]
            configs = [path.read_text() for path in sorted(self._folder.rglob("*.json"))]
            attention = str(settings.attn_implementation)
            cache = GraphCache(
                settings.cache_folder, "\n".join([self._weights, dtype, attention, *versions, *configs])
            )
        example = self._model.preprocess(PROBES[:2])
        while True:
            backend = OpenVINOBackend(
                self._model,
                example,
                threads=self._threads,
                int8=dtype == "int8",
                cache=cache,
            )
            error = self._difference(backend)
            if error <= CONVERSION_TOLERANCE[dtype]:
                return backend
            if cache is None or not backend.from_cache:
                raise ValueError(f"its vectors differ from torch's by {error:.2g}")
            cache.forget()
            cache = None

    def _difference(self, backend: Backend) -> float:
        """How far a backend is from torch, as a share of the largest number, on texts of all lengths."""
        batch = self.tokenize(PROBES, None, None)
        expected = TorchBackend(self._model).forward(self._features(batch))
        got = backend.forward(self._features(batch))
        return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12))

    def _warm_up(self) -> int:
        """Run the extremes: one short text, the longest that fit, and the most; returns the dimension.

        Where the longest do not fit in the device's memory the budget is halved until they do.
        """
        short, long = self.tokenize(["warm", "up " * self.max_seq_length], None, None)
        dimension = int(self.forward([short]).shape[1])
        while True:
            try:
                self.forward([long] * max(1, self.max_batch_tokens // long.length))
                self.forward([short] * max(1, self.max_batch_tokens // short.length))
                for lane in range(self.lanes):
                    self.forward([short], lane, alone=False)
                return dimension
            except OutOfMemory:
                if self.max_batch_tokens <= self.max_seq_length:
                    raise StartupError(
                        "The device's memory does not hold one text of MAX_SEQ_LENGTH tokens; lower it"
                    ) from None
                self.max_batch_tokens = max(self.max_seq_length, self.max_batch_tokens // 2)
                log.warning(
                    "BATCH_SIZE is more than the device's memory holds: running at most %d tokens at once",
                    self.max_batch_tokens,
                )

    def _fingerprint(self, dtype: str) -> str:
        """Equal for services whose vectors are interchangeable: weights, dtype, pooling, prompts, length."""
        facts = [
            self._weights,
            dtype,
            _pooling_name(self._pooling),
            self._prompts,
            self.max_seq_length,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def choose_device(wanted: str, cpu_fallback: bool) -> str:
    """The torch device for DEVICE. Raises StartupError where it is missing and must not be the CPU."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        missing = index >= visible
        why = f"DEVICE={wanted}, but {visible} CUDA devices are visible"
    elif wanted == "mps":
        missing, why = not torch.backends.mps.is_available(), "DEVICE=mps, but there is no MPS device"
    else:
        missing, why = False, ""
    if not missing:
        return wanted
    if not cpu_fallback:
        raise StartupError(f"{why}, and CPU_FALLBACK=false. Start with --gpus all, or set DEVICE=cpu")
    log.warning("%s: RUNNING ON THE CPU, far slower. CPU_FALLBACK=false makes this an error", why)
    return "cpu"


def _prepare(device: str, threads: int) -> None:
    """Settings of the libraries that hold for the whole process."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    # On a CPU the tokenizer's threads would take the cores from the model.
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if device == "cpu" else "true"
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def _load(folder: Path, device: str, dtype: str, attn_implementation: str | None) -> SentenceTransformer:
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True}
    if attn_implementation:
        arguments["attn_implementation"] = attn_implementation
    try:
        model = SentenceTransformer(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs=arguments,
        )
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise StartupError(
            f"The model in {folder} cannot be loaded ({type(error).__name__}: {line})"
        ) from error
    return model.to(DTYPES[dtype]).eval()


def _limit_length(model: SentenceTransformer, wanted: int) -> int:
    """Lower the model's maximum to `wanted` tokens, or to what its positions allow."""
    limits = [wanted]
    own = model.max_seq_length
    if own is not None and own < NO_LIMIT:
        limits.append(int(own))
        if wanted > own:
            log.info("MAX_SEQ_LENGTH=%d is above the model's own %d, which holds", wanted, own)
    if isinstance(model[0], Transformer):
        positions = getattr(model[0].config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            limits.append(positions - model[0]._infer_flatten_position_offset())
        model.max_seq_length = min(limits)
    return min(limits) if isinstance(model[0], Transformer) or own is not None else wanted


def _pooling_name(pooling: Pooling | None) -> str:
    if pooling is None:
        return "none"
    mode = pooling.pooling_mode
    return mode if isinstance(mode, str) else "+".join(mode)


def _checked(texts: Sequence[str]) -> Sequence[str]:
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("is not valid Unicode: it has a lone surrogate", index=index) from None
    return texts
