"""The fingerprint: equal for services whose vectors are interchangeable."""

import hashlib
import json
import os
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_service.inference.model_files import (
    TRANSFORMERS,
    Listing,
    Module,
    is_weights,
    modules,
    transformer_config,
)

if TYPE_CHECKING:
    # It has numpy, which the master needs only once the model is loading.
    from embedding_service.engine import Int8Ranges

# Files are hashed in segments, on all cores at once.
SEGMENT_BYTES = 4 << 20

# Keys of configurations that no vector depends on. The number format is that of the service.
UNUSED = frozenset(
    [
        *("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("id2label", "label2id", "finetuning_task", "problem_type", "gradient_checkpointing"),
        *("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        *("tokenizer_file", "special_tokens_map_file", "is_local", "local_files_only"),
        "clean_up_tokenization_spaces",
    ]
)


def fingerprint(
    folder: Path,
    *,
    dtype: str,
    max_seq_length: int,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    digest: str | None = None,
) -> str:
    """A short hash of everything that `SentenceTransformer.encode` reads for the model in a folder.

    `dtype` is the number format in which the service computes, `max_seq_length`, `prompts` and
    `default_prompt_name` are the service's settings; `digest` is the model_digest, if it is known.
    """
    listing = Listing.of(folder)
    texts, default = effective_prompts(listing, prompts, default_prompt_name)
    length = _length_limit(listing, max_seq_length)
    # An empty prompt is the same as none.
    read = {name: text for name, text in texts.items() if text}
    return _hash([digest or model_digest(folder), dtype, length, read, read.get(default or "")])


def model_digest(folder: Path) -> str:
    """A hash of the modules of a model: their weights, configurations and tokenizers, and truncate_dim."""
    listing = Listing.of(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [
            [module.kind, module.kwargs, _files(listing, folder, module, pool)] for module in modules(listing)
        ]
    return _hash([found, service_config(listing).get("truncate_dim")])


def with_ranges(fingerprint: str, ranges: "Int8Ranges") -> str:
    """The fingerprint of a service that also answers in int8, with these ranges."""
    return _hash([fingerprint, ranges.minimum, ranges.maximum])


def effective_prompts(
    listing: Listing, prompts: Mapping[str, str], default_prompt_name: str | None
) -> tuple[dict[str, str], str | None]:
    """The prompts of a model and of the settings by name, and the name of the default one."""
    config = service_config(listing)
    texts = {**(config.get("prompts") or {}), **prompts}
    known = {name: text for name, text in texts.items() if text is not None}
    return known, default_prompt_name or config.get("default_prompt_name")


def service_config(listing: Listing) -> dict[str, Any]:
    """config_sentence_transformers.json, which is read only beside modules.json."""
    if "modules.json" not in listing.names:
        return {}
    config: dict[str, Any] = listing.json("config_sentence_transformers.json")
    return config


def _length_limit(listing: Listing, wanted: int) -> int | None:
    """The tokens that are read of a text, as far as files show it; None for a model that reads all of it."""
    first, *_ = modules(listing)
    if first.kind == "StaticEmbedding":
        return None
    if first.kind not in TRANSFORMERS:
        return wanted
    own = listing.json(transformer_config(listing, first.folder) or "")
    if "modules.json" not in listing.names:
        own = {}
    arguments = own.get("processor_kwargs") or own.get("tokenizer_args") or {}
    tokenizer = listing.json(posixpath.join(first.folder, "tokenizer_config.json"))
    config = listing.json(posixpath.join(first.folder, "config.json"))
    positions = config.get("text_config", config).get("max_position_embeddings")
    lengths = (
        arguments.get("model_max_length")
        or own.get("max_seq_length")
        or tokenizer.get("model_max_length", wanted),
        positions,
    )
    return min(
        [wanted, *(int(length) for length in lengths if isinstance(length, int | float) and length > 0)]
    )


def _files(listing: Listing, folder: Path, module: Module, pool: ThreadPoolExecutor) -> list[list[str]]:
    """The name of each file within the module and a hash of its content."""
    return [
        [posixpath.relpath(name, module.folder or "."), _content(listing, folder, name, pool)]
        for name in module.files
        if not name.endswith(".index.json")
    ]


def _content(listing: Listing, folder: Path, name: str, pool: ThreadPoolExecutor) -> str:
    if name.endswith("config.json"):
        config = listing.json(name)
        unused = UNUSED | {"architectures"} if "modules.json" in listing.names else UNUSED
        return _hash([{key: value for key, value in config.items() if key not in unused}])
    path = folder / name
    starts = range(0, path.stat().st_size if path.exists() else 0, SEGMENT_BYTES)

    def digest(start: int) -> str:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return hashlib.sha256(file.read(SEGMENT_BYTES)).hexdigest()

    return _hash([is_weights(name), *pool.map(digest, starts)])


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
