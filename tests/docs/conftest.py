"""Virtual environments with only some of the packages that the tests have."""

import functools
import venv
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def with_dependencies(requirements: Iterable[str]) -> set[str]:
    """The names of these packages and of all that they require on this machine."""
    found: set[tuple[str, str]] = set()
    wanted = [(Requirement(line), "") for line in requirements]
    while wanted:
        one, extra = wanted.pop()
        if one.marker and not one.marker.evaluate({"extra": extra}):
            continue
        new = {(canonicalize_name(one.name), extra) for extra in ("", *one.extras)} - found
        found |= new
        wanted += [
            (Requirement(line), extra) for name, extra in new for line in metadata.requires(name) or []
        ]
    return {name for name, _ in found}


def make_environment(folder: Path, requirements: Iterable[str]) -> Path:
    """An environment with links to the files of these installed packages; returns its bin folder."""
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for name in with_dependencies(requirements):
        for file in metadata.files(name) or []:
            if ".." not in file.parts:
                link = packages / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(str(file.locate()))
    return folder / "bin"


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`environment("numpy", "requests")`, made once for each list of packages."""
    return functools.cache(
        lambda *requirements: make_environment(tmp_path_factory.mktemp("environment"), requirements)
    )
