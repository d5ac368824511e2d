"""A prepared model: what a start without torch needs of a model that has passed every check."""

import functools
import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embedding_service.engine import ModelInfo, Vectors
from embedding_service.inference.backends import Session
from embedding_service.inference.budget import BatchCost
from embedding_service.inference.fingerprint import model_digest
from embedding_service.inference.preprocessing import PROBES, Preprocessor, TokenizerFacts
from embedding_service.inference.source import Source
from embedding_service.inference.store import Entry, cpu_model
from embedding_service.inference.tokenized import Rows
from embedding_service.settings.config import Config

log = logging.getLogger(__name__)

# Increased whenever the content of entries, or what a graph computes, changes.
FORM = 2

# What runs a prepared model, and what prepares one.
SERVING = ("openvino", "tokenizers")
PREPARING = ("torch", "transformers", "sentence-transformers", "nncf")

# How far a converted model may be from torch, as a share of the largest number in the vectors.
# bfloat16 has three digits, which the layers of a model add up.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.3}


@dataclass(frozen=True, eq=False)
class Reference:
    """What sentence-transformers gave for the probes with a prompt: the model's inputs, and its vectors."""

    prompt: str
    inputs: dict[str, Any]
    vectors: Vectors | None = None


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry says of its model; beside it are the graph and the references.

    `cost` is that of the machine on which the model was prepared.
    """

    info: ModelInfo
    normalized: bool
    tokenizer: TokenizerFacts
    prompts: list[str]
    # Whether only texts of equal length may share a batch.
    without_padding: bool
    cost: BatchCost


class Keys:
    """The entries of one model with its settings; `digest` is the hash of its files."""

    def __init__(self, settings: Config, source: Source, digest: str) -> None:
        self._folder = settings.cache_folder
        self._settings = settings
        config = source.folder / "config_sentence_transformers.json"
        self._names = config.read_text(errors="replace") if config.is_file() else ""
        self.digest = digest

    def prepared(self) -> Entry:
        """The entry of the prepared model."""
        s = self._settings
        facts = [s.dtype, s.backend, s.batch_size, s.max_seq_length, s.prompts, s.default_prompt_name]
        return self._entry("models", self._names, s.attn_implementation, *facts)

    def graph(self, dtype: str) -> Entry:
        """The entry of the graph, or of the reason why there can be none. bfloat16 has float32's."""
        form = "int8" if dtype == "int8" else "float32"
        return self._entry("graphs", form, self._settings.attn_implementation)

    def cost(self, backend: str, dtype: str, sessions: int, threads: int, device: str) -> Entry:
        """The entry of what batches cost on this CPU."""
        s = self._settings
        facts = [backend, dtype, sessions, threads, device, s.batch_size, s.max_seq_length, cpu_model()]
        if s.device_processes > 1:
            facts.append(s.device_processes)
        return self._entry("costs", s.attn_implementation, *facts)

    def _entry(self, kind: str, *facts: object) -> Entry:
        made_with = [_version(name) for name in PREPARING] if can_prepare() else None
        serving = [_version(name) for name in SERVING]
        return Entry(self._folder, kind, [FORM, *serving, self.digest, *facts], made_with)


def can_prepare() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


@functools.cache
def _version(package: str) -> str:
    """The version of a package, read without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def keys_of(settings: Config, source: Source) -> Keys:
    """The keys of the files as they are now. Raises StartupError if files are missing."""
    return Keys(settings, source, model_digest(source.folder))


def inputs_of(preprocessor: Preprocessor, prompt: str) -> dict[str, Any]:
    """The model's inputs for the probes with a prompt."""
    return preprocessor.pack([Rows.all_of(preprocessor.prepare(PROBES, prompt))])


def same_inputs(preprocessor: Preprocessor, references: Iterable[Reference]) -> bool:
    """Whether the preprocessor gives exactly the inputs of the references."""
    for reference in references:
        own = inputs_of(preprocessor, reference.prompt)
        if own.keys() != reference.inputs.keys() or not all(
            np.array_equal(own[name], value) for name, value in reference.inputs.items()
        ):
            return False
    return True


def difference(session: Session, references: Iterable[Reference]) -> float:
    """How far a session is from the references at most, as a share of the largest number in the vectors."""
    return float(np.max([_difference(session.run(dict(one.inputs)), one.vectors) for one in references]))


def _difference(vectors: Vectors, expected: Vectors | None) -> float:
    assert expected is not None
    return float(np.abs(vectors - expected).max() / max(np.abs(expected).max(), 1e-12))


def save(entry: Entry, prepared: Prepared, references: Sequence[Reference]) -> None:
    """Write an entry, if that is possible."""
    arrays = {
        f"{number}.{name}": np.asarray(value)
        for number, one in enumerate(references)
        for name, value in [*one.inputs.items(), ("vectors", one.vectors)]
    }

    def write(folder: Path) -> None:
        _write(folder / "facts.json", prepared)
        np.savez(folder / "references.npz", **arrays)  # type: ignore[arg-type]

    entry.keep(write, "The prepared model is not kept for the next start")


def read(entry: Entry) -> tuple[Prepared, list[Reference]] | None:
    """A prepared model and its references, if the entry is there and whole."""
    if (folder := entry.find()) is None:
        return None
    try:
        prepared = msgspec.json.decode((folder / "facts.json").read_bytes(), type=Prepared)
        with np.load(folder / "references.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        references = []
        for number, prompt in enumerate(prepared.prompts):
            prefix = f"{number}."
            inputs = {
                name.removeprefix(prefix): value if value.ndim else value.item()
                for name, value in arrays.items()
                if name.startswith(prefix)
            }
            vectors = inputs.pop("vectors")
            references.append(Reference(prompt, inputs, vectors))
    except (OSError, ValueError, KeyError, msgspec.MsgspecError) as error:
        log.warning("The prepared model in %s cannot be read: %s", folder, error)
        entry.forget()
        return None
    return prepared, references


def read_cost(entry: Entry) -> BatchCost | None:
    """The cost in an entry, or None if it is missing or implausible."""
    try:
        if (folder := entry.find()) is None:
            return None
        cost = msgspec.json.decode((folder / "cost.json").read_bytes(), type=BatchCost)
    except (OSError, msgspec.MsgspecError):
        return None
    sound = all(0 < part < math.inf for part in (cost.batch_seconds, cost.token_seconds))
    return cost if sound else None


def save_cost(entry: Entry, cost: BatchCost) -> None:
    """Write what batches cost here, if that is possible."""
    entry.keep(
        lambda folder: _write(folder / "cost.json", cost),
        "The measured cost of batches is not kept for the next start",
    )


def _write(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.encode(content))
