"""A SentenceTransformer read from its folder, and the facts that the service needs about it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from embedding_service.errors import StartupError
from embedding_service.inference.device import choose_device
from embedding_service.inference.hardware import computes_bfloat16
from embedding_service.inference.missing_weights import missing_weight
from embedding_service.inference.source import Source
from embedding_service.settings.config import Config

log = logging.getLogger(__name__)

# Tokenizers use a huge number for an unknown maximum; anything above this counts as unknown.
NO_LIMIT = 1_000_000

# The format in which torch holds the weights. int8 is what OpenVINO makes of float32.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in the memory of its device, and the files that it was read from.

    `digest` is the hash of its files, `dtype` the number format in which the service computes.
    """

    model: SentenceTransformer
    source: Source
    settings: Config
    digest: str
    device: str
    dtype: str
    max_seq_length: int

    @property
    def on_cpu(self) -> bool:
        """Whether the model runs on the CPU, whose cores everything else needs too."""
        return self.device == "cpu"

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts by name."""
        return {name: text for name, text in self.model.prompts.items() if text is not None}

    @property
    def normalized(self) -> bool:
        """Whether the model's vectors have length 1 to float32 precision."""
        return isinstance(list(self.model)[-1], Normalize) and self.dtype in ("float32", "int8")

    def in_float32(self) -> SentenceTransformer:
        """The model in float32.

        If it must be read again, then from the files and on the CPU: the rounded weights are not the
        model's own, the device may have no room for a second model, and flash attention knows no float32.
        """
        if self.model.dtype in (None, torch.float32):
            return self.model
        exact = load_model(self.source.folder, "cpu", "float32", None)
        limit_length(exact, self.max_seq_length)
        return exact


def read_checkpoint(settings: Config, source: Source, digest: str) -> Checkpoint:
    """Load a model's files, of which `digest` is the hash, onto the device. Raises StartupError."""
    device = choose_device(settings.device, settings.cpu_fallback)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    # OpenVINO rounds to bfloat16 for itself, where that is exact enough.
    rounds = dtype == "bfloat16" and computes_bfloat16(device, settings.backend)
    model = load_model(source.folder, device, "float32" if rounds else dtype, settings.attn_implementation)
    set_prompts(model, settings)
    if model.similarity_fn_name != "cosine" and not isinstance(list(model)[-1], Normalize):
        log.info(
            'This model compares vectors by %s, for which their lengths count: send "normalize": false',
            model.similarity_fn_name,
        )
    return Checkpoint(
        model=model,
        source=source,
        settings=settings,
        digest=digest,
        device=device,
        dtype=dtype,
        max_seq_length=limit_length(model, settings.max_seq_length),
    )


def load_model(folder: Path, device: str, dtype: str, attn_implementation: str | None) -> SentenceTransformer:
    """The model in a folder, ready to compute. Raises StartupError."""
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype]}
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
        if "trust_remote_code" in str(error):
            raise StartupError(
                f"The model in {folder} needs code of its own, which this service never runs"
            ) from None
        line = shorten(str(error), 300, placeholder=" …")
        raise StartupError(
            f"The model in {folder} cannot be loaded ({type(error).__name__}: {line})"
        ) from error
    if lacking := missing_weight(model):
        raise StartupError(f"The model in {folder} is incomplete: its files lack the weights {lacking}")
    if model.truncate_dim is not None:
        if not isinstance(model.truncate_dim, int) or model.truncate_dim < 1:
            raise StartupError(
                f"The model in {folder} has truncate_dim={model.truncate_dim!r}, not 1 or more"
            )
        model.append(Truncate(model.truncate_dim))
    return model.to(DTYPES[dtype]).eval()


class Truncate(torch.nn.Module):
    """The last step of `encode` with truncate_dim: the first numbers of each vector."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["sentence_embedding"] = features["sentence_embedding"][..., : self.dimension]
        return features


def set_prompts(model: SentenceTransformer, settings: Config) -> None:
    """Add the prompts of the settings to the model's own. Raises StartupError for an unknown default."""
    model.prompts.update(settings.prompts)
    name = settings.default_prompt_name
    if name is None:
        return
    if model.prompts.get(name) is None:
        known = ", ".join(sorted(name for name, text in model.prompts.items() if text is not None)) or "none"
        raise StartupError(f"DEFAULT_PROMPT_NAME={name!r} is not a prompt; there are: {known}")
    model.default_prompt_name = name


def length_limit(model: SentenceTransformer) -> int | None:
    """The model's own maximum of tokens a text; None if it reads texts of any length whole."""
    own = model.max_seq_length
    return int(own) if own is not None and own < NO_LIMIT else None


def limit_length(model: SentenceTransformer, wanted: int) -> int:
    """Lower the model's maximum to `wanted` tokens, or to what its positions allow, and return it."""
    limits = [wanted]
    own = length_limit(model)
    if own is not None:
        limits.append(own)
        if wanted > own:
            log.info("MAX_SEQ_LENGTH=%d is above the model's own limit of %d, which applies", wanted, own)
    if isinstance(model[0], Transformer):
        # A model of texts and images has positions for each.
        positions = getattr(model[0].config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            limits.append(positions - model[0]._infer_flatten_position_offset())
        model.max_seq_length = min(limits)
    return min(limits)


def find_pooling(model: SentenceTransformer) -> Pooling | None:
    """The module that combines the token vectors into one."""
    return next((module for module in model if isinstance(module, Pooling)), None)
