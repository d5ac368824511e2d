"""`pip install .` installs a command that serves from any folder, with all the files that it needs."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import requests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from embedding_service import __version__
from tests.service import ROOT

CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]


def read(path: str) -> list[Requirement]:
    """The packages of a requirements file."""
    lines = (ROOT / path).read_text().splitlines()
    return [Requirement(line) for line in lines if line[0] not in "#-"]


PINS = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in read("constraints.txt")}


def named(requirements: Iterable[Requirement]) -> set[tuple[str, str]]:
    """The names and markers."""
    return {(canonicalize_name(one.name), str(one.marker or "")) for one in requirements}


def test_depends_on_the_packages_in_the_requirements():
    declared = [Requirement(line) for line in PROJECT["dependencies"]]
    assert named(declared) == named(read("requirements.txt"))


def test_every_range_has_a_pin_inside_it():
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *itertools.chain.from_iterable(extras.values())]:
        one = Requirement(line)
        assert one.specifier.contains(PINS[canonicalize_name(one.name)]), line


def test_everything_that_developers_install_is_pinned():
    groups = CONFIGURATION["dependency-groups"]
    lines = [line for group in groups.values() for line in group if isinstance(line, str)]
    assert {canonicalize_name(Requirement(line).name) for line in lines} <= PINS.keys()


def test_the_tests_have_the_packages_of_every_extra_but_ray():
    extras = PROJECT["optional-dependencies"]
    needed = [Requirement(line) for name, extra in extras.items() if name != "ray" for line in extra]
    assert named(needed) == named(map(Requirement, CONFIGURATION["dependency-groups"]["extras"]))


@pytest.fixture(scope="module")
def wheel(own_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "embedding_service", source / "embedding_service")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def command(wheel: Path) -> Iterator[str]:
    """The console command, installed in a virtual environment that sees the dependencies of this one."""
    environment = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    pip("--python", python, "install", "--no-deps", "--no-index", str(wheel))
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    (Path(where.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    yield str(environment / "bin" / "embedding-service")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "embedding_service").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files


def test_serves_from_an_empty_folder(command, start, tmp_path, oracle):
    empty = tmp_path / "empty"
    empty.mkdir()
    service = start([command, "serve", "--port", "{port}"], cwd=empty, PORT="1").wait_ready()
    vectors = service.post("/embed", {"texts": "hello"}).json()["embeddings"]
    assert abs(vectors[0] - oracle.encode("hello", normalize_embeddings=True)).max() < 1e-5
    assert "<title>" in requests.get(service.url, timeout=60).text
    assert str(ROOT) not in " ".join(service.model_process().cmdline())
    assert service.stop() == 0
    assert not list(empty.iterdir())


def test_embeds_a_file(command, tmp_path):
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    subprocess.run([command, "embed", "rows.txt", "-o", "rows.npy"], cwd=tmp_path, check=True)
    assert (tmp_path / "rows.npy").is_file()


def test_prints_its_version(command, tmp_path):
    done = subprocess.run([command, "--version"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == f"embedding-service {__version__}\n"


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("docs/deployment.md", r"VERSION=(\S+)"),
        ("deploy/kubernetes/base/kustomization.yaml", r"newTag: (\S+)"),
    ],
)
def test_names_the_version_that_is_released(path, pattern):
    assert re.findall(pattern, (ROOT / path).read_text()) == [__version__]


def test_a_release_is_tagged_once_and_only_from_a_clean_tree_with_its_section(tmp_path):
    for name in ("Makefile", "CHANGELOG.md", "embedding_service/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | identity, capture_output=True, text=True, check=False
        )

    run("git", "init", "-q")
    assert "has changes" in run("make", "release").stderr
    run("git", "add", "-A")
    run("git", "commit", "-qm", "all")
    done = run("make", "release")
    assert done.returncode == 0, done.stderr
    assert run("git", "tag").stdout == f"v{__version__}\n"
    assert "exists already" in run("make", "release").stderr
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    run("git", "commit", "-qam", "no section")
    assert "has no section" in run("make", "release").stderr
