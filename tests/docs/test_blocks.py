"""Runs every code block of README and docs, except for those that are listed here with a reason.

A Python block has only the packages that its page says to install; a command has those of requirements.txt.
"""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.conftest import require_program
from tests.service import ROOT, Service

# The fixture `environment` of conftest.py.
Environment = Callable[..., Path]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Start of a command that is not run here -> why. Its syntax is checked, and its files and modules must exist.
NOT_RUN = {
    "docker ": "needs Docker; tests/deploy builds the image and checks the compose file",
    "kubectl apply": "needs a cluster; tests/deploy renders and validates the files",
    "systemctl ": "needs systemd as process 1; tests/deploy/test_systemd.py runs the unit's command",
    "cp deploy/systemd/": "belongs to the systemctl command after it",
    "cp -r . /opt/": "writes to /opt",
    "git clone": "needs the repository's address",
    "make ": "installs packages or measures for minutes; `make --dry-run` is checked",
    "pip install -c constraints.txt torch": "needs PyTorch's index",
    "pip install -c constraints.txt .": "installs for minutes; tests/deploy/test_install.py runs it",
    "pip install -c constraints.txt '.[ray]'": "tests/deploy/test_ray.py runs with it",
    "embedding-service serve": "runs until it is stopped; tests/deploy/test_install.py runs it",
    "CORS_ORIGINS=": "runs until it is stopped; test_cors.py and test_prompts.py use these settings",
    "HF_HOME=/tmp/models embedding-service download": "needs the hub",
    "embedding-service calibrate": "tests/test_quantization.py runs it",
    "embedding-service verify": "tests/verify runs it",
    "aiperf ": "needs other versions of our packages; tests/clients/test_load_tools.py sends its requests",
    "vllm bench ": "needs vLLM; tests/clients/test_load_tools.py sends its requests",
    "gunicorn -w 4": "runs until it is stopped; tests/processes/test_ways_to_start.py runs it",
    "./install.sh": "needs a bundle; tests/deploy/test_bundle.py runs it",
    "cd /opt/embedding-service": "needs a bundle; tests/deploy/test_bundle.py runs it",
    "python -m benchmarks.": "measures for minutes",
    "python examples/ray_bulk.py": "needs Ray; tests/deploy/test_ray.py runs it",
}

# A package that cannot be installed beside the others -> why.
NOT_INSTALLED = {
    "langchain-huggingface": "needs an older huggingface-hub; tests/deploy/test_install.py runs the example",
}


SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin:/bin"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """The page and line of the block."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """The blocks of all pages, in order."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S):
            yield Block(page, text[: match.start()].count("\n") + 1, match[1], match[2])


BLOCKS = list(blocks())


def of(*languages: str) -> Any:
    """The blocks in these languages, as parameters of a test."""
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.name)


def commands(block: Block) -> list[str]:
    """The commands of a block, without comments; lines that end in a backslash are joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def reason_not_to_run(command: str) -> str | None:
    """Why a command is not run, or None."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def at(service: Service, text: str) -> str:
    """The text with the address of the running service."""
    return text.replace("http://localhost:8001", service.url)


def run(
    command: str, folder: Path, programs: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with the system's programs, and first of all those in another folder."""
    path = f"{programs}:{SYSTEM_PATH}" if programs else SYSTEM_PATH
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={"PATH": path, "HOME": str(Path.home())} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def packages(page: Path) -> list[str]:
    """The packages that the page tells its reader to install, in alphabetical order."""
    words = " ".join(re.findall(r"`pip install ([^`]*)`", page.read_text())).split()
    named = {word for word in words if not word.startswith("-") and not word.endswith(".txt")}
    return sorted(named - NOT_INSTALLED.keys())


def test_every_block_has_a_known_language() -> None:
    unknown = [
        block.name for block in BLOCKS if block.language not in ("bash", "json", "python", "yaml", "text")
    ]
    assert not unknown


def test_no_fence_is_left_open() -> None:
    assert [page.name for page in PAGES if len(re.findall(r"^```", page.read_text(), re.M)) % 2] == []


def test_every_reason_is_needed() -> None:
    found = [command for block in BLOCKS if block.language == "bash" for command in commands(block)]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in found)] == []


def test_an_environment_has_only_what_was_asked_for(environment: Environment, tmp_path: Path) -> None:
    programs = environment("requests")
    assert run("python -c 'import requests, urllib3'", tmp_path, programs).returncode == 0
    assert "No module named 'numpy'" in run("python -c 'import numpy'", tmp_path, programs).stderr


@pytest.mark.process
@of("bash")
def test_bash(block: Block, service: Service, environment: Environment, tmp_path: Path) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    programs = environment(*(line for line in lines if not line.startswith(("#", "-"))))
    assert run(f"bash -n <<'BLOCK'\n{block.text}BLOCK", tmp_path).returncode == 0
    prepare(tmp_path)
    for command in commands(block):
        if reason_not_to_run(command):
            check_without_running(command)
            continue
        if command == "nginx -t":
            require_program("nginx", "nginx-light")
        result = run(as_run_here(command, service, tmp_path), tmp_path, programs, PYTHONPATH=str(ROOT))
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def as_run_here(command: str, service: Service, folder: Path) -> str:
    """The command, with this service's address, this interpreter, and a temporary folder instead of /etc."""
    command = at(service, command).replace(".venv/bin/python", "python")
    command = command.replace("/etc/nginx", f"{folder}/etc/nginx")
    if command.startswith("curl "):
        command = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    if command == "nginx -t":
        command += f" -p {folder} -c {folder}/etc/nginx/nginx.conf -e {folder}/error.log"
    return command


def prepare(folder: Path) -> None:
    """The files that the commands need: an input file, and nginx.conf with temporary paths."""
    lines = [json.dumps({"text": f"text {number}"}) for number in range(3)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "deploy").mkdir()
    shipped = (ROOT / "deploy" / "nginx.conf").read_text()
    for place in ("/etc/nginx/", "/run/", "/var/log/nginx/"):
        shipped = shipped.replace(place, f"{folder}{place}")
        (folder / place.strip("/")).mkdir(parents=True, exist_ok=True)
    (folder / "deploy" / "nginx.conf").write_text(shipped)


def check_without_running(command: str) -> None:
    """Assert that the targets, modules and files in a command exist."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        target = [word for word in words[1:] if word not in ("-C", "/opt/embedding-service")]
        dry = subprocess.run(["make", "--dry-run", *target], cwd=ROOT, capture_output=True, check=False)
        assert dry.returncode == 0, dry.stderr
    for option, value in itertools.pairwise(words):
        if option == "-m" and words[0] == "python":
            assert importlib.util.find_spec(value), value
        if option in ("-c", "-r", "-f", "-k") and words[0] != "gunicorn":
            assert (ROOT / value).exists(), value
    for word in words:
        if word.startswith(("deploy/", "examples/")):
            assert (ROOT / word).exists(), word


@of("json")
def test_json(block: Block, service: Service, tmp_path: Path) -> None:
    """A JSON block is the response to the command in the block before it."""
    before = BLOCKS[BLOCKS.index(block) - 1]
    assert before.page == block.page and before.language == "bash"
    result = run(at(service, before.text).replace("curl ", "curl --silent ", 1), tmp_path)
    assert_same_shape(json.loads(block.text), json.loads(result.stdout))


def assert_same_shape(shown: Any, real: Any) -> None:
    """Assert that `real` has the form that is shown; "…" stands for anything."""
    if isinstance(shown, dict):
        assert list(shown) == list(real)
        for key, value in shown.items():
            assert_same_shape(value, real[key])
    elif isinstance(shown, list):
        assert isinstance(real, list)
        assert "…" in shown or len(shown) == len(real)
        for left, right in zip(shown, real, strict=False):
            assert_same_shape(left, right)
    elif isinstance(shown, float):
        assert isinstance(real, float)
    elif shown != "…":
        assert shown == real


@pytest.mark.process
@of("python")
def test_python(block: Block, service: Service, environment: Environment, tmp_path: Path) -> None:
    """The block runs with what the page says to install."""
    for package, reason in NOT_INSTALLED.items():
        if package.replace("-", "_") in block.text:
            pytest.skip(reason)
    (tmp_path / "block.py").write_text(at(service, block.text))
    result = run("python block.py", tmp_path, environment(*packages(block.page)))
    assert result.returncode == 0, result.stderr


@of("yaml")
def test_yaml(block: Block) -> None:
    """Parts of other programs' files are only parsed."""
    assert yaml.safe_load(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links to files, and to headings of pages."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http:", "https:", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link
