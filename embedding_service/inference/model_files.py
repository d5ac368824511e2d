"""Which files of a model's folder a load reads: by modules.json, the index of its weights, its tokenizer."""

import posixpath
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from embedding_service.errors import StartupError

# The configuration of a transformer within sentence-transformers; the first one that is there is read.
TRANSFORMER_CONFIGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]

# The files of the modules that do not keep their configuration in config.json alone.
MODULE_FILES = {
    "StaticEmbedding": ["tokenizer.json"],
    "CNN": ["cnn_config.json"],
    "LSTM": ["lstm_config.json"],
    "WordEmbeddings": [
        "wordembedding_config.json",
        "whitespacetokenizer_config.json",
        "phrasetokenizer_config.json",
    ],
}
# Safetensors if there are any; else a pickle, from which torch reads nothing but data.
WEIGHTS = ["model.safetensors", "pytorch_model.bin"]
TRANSFORMERS = ("Transformer", "CLIPModel")
ROUTERS = ("Router", "Asym")
WEIGHTED = (*TRANSFORMERS, *MODULE_FILES, "Dense", "LayerNorm", "WeightedLayerPooling")

# Beside its vocabulary, a tokenizer reads these. What they say of images decides how texts are read, too.
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
]
# These are read if tokenizer_config.json does not say which tokens were added.
LEGACY_TOKENIZER_FILES = ["special_tokens_map.json", "added_tokens.json"]
# As in the classes of `transformers` (vocab_files_names).
VOCABULARIES = [
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "entity_vocab.json"),
    *("spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("tokenizer.model", "tiktoken.model", "tekken.json", "source.spm", "target.spm", "target_vocab.json"),
    *("vocab-src.json", "vocab-tgt.json", "prophetnet.tokenizer", "byte_maps.json", "normalizer.json"),
]
# The tokenizers that read nothing but tokenizer.json if it is there; others read their vocabulary as well.
READ_ONE_FILE = frozenset(
    [
        *(
            "PreTrained",
            "TokenizersBackend",
            "Albert",
            "Bart",
            "Bert",
            "Camembert",
            "DebertaV2",
            "DistilBert",
        ),
        *("GPT2", "Gemma", "Llama", "MPNet", "Qwen2", "Roberta", "T5", "XLMRoberta"),
    ]
)


# What the other kinds of model of sentence-transformers give instead of one dense vector for a text, and
# what serves them.
OTHER_KINDS = {
    "CrossEncoder": "scores pairs of texts; text-embeddings-inference serves it at /rerank",
    "SparseEncoder": "gives sparse vectors; text-embeddings-inference serves it at /embed_sparse",
    "MultiVectorEncoder": "gives a vector for each token; vLLM serves it",
}
PACKAGES = {
    "cross_encoder": "CrossEncoder",
    "sparse_encoder": "SparseEncoder",
    "multi_vector_encoder": "MultiVectorEncoder",
}
TASKS = {
    "sequence-classification": "CrossEncoder",
    "fill-mask": "SparseEncoder",
    "retrieval": "MultiVectorEncoder",
}


@dataclass(frozen=True)
class Listing:
    """The names of a model's files, relative to its folder, and how to read one."""

    names: Collection[str]
    read: Callable[[str], bytes]

    @classmethod
    def of(cls, folder: Path) -> "Listing":
        """The files of a folder."""
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return cls(names, lambda name: (folder / name).read_bytes())

    def json(self, name: str) -> Any:
        """The content of a JSON file, or an empty dictionary if there is none. Raises StartupError."""
        if name not in self.names:
            return {}
        try:
            return msgspec.json.decode(self.read(name))
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            raise StartupError(f"has a {name} that cannot be read: {error}") from None


@dataclass(frozen=True)
class Module:
    """One module of a model: its class, its folder, what it takes from a request, and its files in order."""

    kind: str
    folder: str
    kwargs: list[str]
    files: list[str]


def names_read(listing: Listing) -> list[str]:
    """The names of the files that a load reads.

    Raises StartupError, with what follows the model's name, if a file is missing or if the model is not
    one that gives a vector for a text.
    """
    if kind := _other_kind(listing):
        raise StartupError(f"is a {kind}, which {OTHER_KINDS[kind]}; this service computes dense vectors")
    found = modules(listing)
    for module in found:
        if "." in module.kind:
            raise StartupError(f"needs code of its own ({module.kind}), which this service never runs")
        if module.kind in WEIGHTED and not any(is_weights(name) for name in module.files):
            missing = [posixpath.join(module.folder, name) for name in WEIGHTS]
            raise StartupError(f"has no weights: neither {' nor '.join(missing)}")
    names = [name for module in found for name in module.files]
    if lacking := [name for name in names if name not in listing.names]:
        raise StartupError(f"is incomplete: it lacks {', '.join(lacking)}")
    own = [name for name in ("modules.json", "config_sentence_transformers.json") if name in listing.names]
    return [*own, *dict.fromkeys(names)]


def _other_kind(listing: Listing) -> str | None:
    """The class that sentence-transformers has for this model, if it is none for dense vectors."""
    if "modules.json" not in listing.names:
        architectures = listing.json("config.json").get("architectures") or [""]
        return "CrossEncoder" if architectures[0].endswith("ForSequenceClassification") else None
    kind = listing.json("config_sentence_transformers.json").get("model_type")
    if kind in OTHER_KINDS:
        return str(kind)
    for entry in listing.json("modules.json"):
        package = entry["type"].split(".")[:2][-1]
        task = listing.json(transformer_config(listing, entry["path"]) or "").get("transformer_task")
        if found := PACKAGES.get(package) or TASKS.get(task):
            return found
    return None


def modules(listing: Listing) -> list[Module]:
    """The modules of a model. Without modules.json, a folder is that of a transformer."""
    if "modules.json" not in listing.names:
        return [Module("Transformer", "", [], list(_transformer_files(listing, "")))]
    return [
        module
        for entry in listing.json("modules.json")
        for module in _module(listing, entry["type"], entry["path"], entry.get("kwargs", []))
    ]


def is_weights(name: str) -> bool:
    """Whether a file holds weights."""
    return name.endswith((".safetensors", ".bin"))


def transformer_config(listing: Listing, folder: str) -> str | None:
    """The file that configures a transformer within sentence-transformers, if there is one."""
    candidates = (posixpath.join(folder, name) for name in TRANSFORMER_CONFIGS)
    return next((name for name in candidates if listing.json(name)), None)


def _module(listing: Listing, kind: str, folder: str, kwargs: list[str]) -> Iterator[Module]:
    """A module, and those within it."""
    package, _, name = kind.rpartition(".")
    # The library has moved its modules between its packages. Others keep their full name.
    kind = name if package.startswith("sentence_transformers.") else kind
    if kind in ROUTERS:
        config = _first(listing, folder, ["router_config.json", "config.json"])
        yield Module(kind, folder, kwargs, config)
        for inner, inner_kind in listing.json(config[0])["types"].items() if config else ():
            yield from _module(listing, inner_kind, posixpath.join(folder, inner), [])
    elif kind in TRANSFORMERS:
        yield Module(kind, folder, kwargs, list(_transformer_files(listing, folder)))
    else:
        present = _present(listing, folder, MODULE_FILES.get(kind, ["config.json"]))
        weights = _first(listing, folder, WEIGHTS)
        yield Module(kind, folder, kwargs, [*present, *weights])


def _transformer_files(listing: Listing, folder: str) -> Iterator[str]:
    # A folder that is not one of sentence-transformers is read by `transformers` alone.
    own = transformer_config(listing, folder) if "modules.json" in listing.names else None
    if own:
        yield own
    yield from _present(listing, folder, ["config.json", "adapter_config.json"])
    yield from _present(listing, folder, ["adapter_model.safetensors"])
    yield from _weights(listing, folder)
    yield from _present(listing, folder, TOKENIZER_FILES)
    config = listing.json(posixpath.join(folder, "tokenizer_config.json"))
    if "added_tokens_decoder" not in config:
        yield from _present(listing, folder, LEGACY_TOKENIZER_FILES)
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    if kind not in READ_ONE_FILE or posixpath.join(folder, "tokenizer.json") not in listing.names:
        yield from _present(listing, folder, VOCABULARIES)
    templates = posixpath.join(folder, "additional_chat_templates/")
    yield from sorted(name for name in listing.names if name.startswith(templates))


def _weights(listing: Listing, folder: str) -> Iterator[str]:
    """The weights of a transformer, which may be in parts."""
    for name in WEIGHTS:
        path = posixpath.join(folder, name)
        if path in listing.names:
            yield path
            return
        if (index := f"{path}.index.json") in listing.names:
            yield index
            parts = set(listing.json(index)["weight_map"].values())
            yield from sorted(posixpath.join(folder, part) for part in parts)
            return


def _present(listing: Listing, folder: str, names: list[str]) -> list[str]:
    return [path for name in names if (path := posixpath.join(folder, name)) in listing.names]


def _first(listing: Listing, folder: str, names: list[str]) -> list[str]:
    return _present(listing, folder, names)[:1]
