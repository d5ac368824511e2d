"""Builds the image without a container engine, and runs its command like a container runtime.

buildah with chroot isolation builds over a base made by debootstrap; `unshare` and `chroot` are the
runtime: own process and mount namespaces, a read-only root, /tmp and /dev/shm in memory, the image's
user, working directory, environment and command, and no privileges.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import require_program
from tests.service import ROOT, Service, free_port, wait_until

PACKAGES = "python3,python3-venv"
BASE, IMAGE = "localhost/python-base", "localhost/embedding-service"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def require_root() -> None:
    """Mounts need root."""
    if os.geteuid() != 0:
        message = "building the image without an engine needs root"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


class Builder:
    """A store of images in a folder, which leaves nothing else on the machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buildah = require_program("buildah", "buildah")
        self._debootstrap = require_program("debootstrap", "debootstrap")

    def make_base(self) -> None:
        """A minimal Debian with Python, as BASE."""
        root = self._folder / "base"
        run([self._debootstrap, "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)])
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(root), "/")
        self.buildah("commit", "--quiet", "--rm", container, BASE)
        run(["rm", "-rf", str(root)])

    def build(self) -> None:
        """The image, as IMAGE; pip has the same configuration inside as outside."""
        configuration, volumes = self._pip_configuration()
        arguments = [
            "--isolation=chroot",
            "--format=docker",  # the OCI format has no HEALTHCHECK
            f"--build-arg=BASE_IMAGE={BASE}",
            f"--secret=id=pip.conf,src={configuration}",
            *(f"--volume={path}:{path}:ro" for path in volumes),
            f"--tag={IMAGE}",
        ]
        self.buildah("build", *arguments, str(ROOT))

    def configuration(self) -> dict[str, Any]:
        """The image's configuration."""
        inspected = json.loads(self.buildah("inspect", "--type=image", IMAGE))
        found: dict[str, Any] = inspected["Docker"]["config"]
        return found

    def mount(self) -> Path:
        """The root of a container of the image."""
        container = self.buildah("from", IMAGE).strip()
        return Path(self.buildah("mount", container).strip())

    def buildah(self, *arguments: str) -> str:
        """Run a command of buildah over this store; returns its output."""
        store = ["--storage-driver=vfs", f"--root={self._folder}/store", f"--runroot={self._folder}/run"]
        return run([self._buildah, *store, *arguments])

    def _pip_configuration(self) -> tuple[Path, list[str]]:
        """A pip.conf with this machine's pip settings, and the local files and folders that it names."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        options: dict[str, str] = {}
        volumes = [CERTIFICATES] if Path(CERTIFICATES).exists() else []
        for line in sorted(run(command, stderr=subprocess.DEVNULL).splitlines(), reverse=True):  # :env: wins
            name, _, value = line.partition("=")
            value = value.strip("'").replace("\\n", " ")
            options[name.strip(":").rpartition(".")[2]] = value
            paths = [part.removeprefix("file://") for part in value.split()]
            volumes += [_beside(path) for path in paths if path.startswith("/") and Path(path).exists()]
        path = self._folder / "pip.conf"
        path.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in options.items())]))
        return path, sorted(set(volumes))


class Container(Service):
    """The image on a free port, as process 1; `arguments` are those after the image's name."""

    def __init__(
        self, folder: Path, root: Path, image: dict[str, Any], *arguments: str, **settings: str
    ) -> None:
        self._root = root
        port = free_port()
        environment = [*image["Env"], f"PORT={port}", "HOST=127.0.0.1"]
        environment += [f"{name}={value}" for name, value in settings.items()]
        uid, _, gid = image["User"].partition(":")
        self._enter = ["env", "-i", "-C", image["WorkingDir"], *environment]
        self._as_user = ["chroot", f"--userspec={uid}:{gid}", "--groups=", str(root)]
        mounts = f"""
            mount --bind {root} {root}
            for device in null zero urandom random; do
                touch {root}/dev/$device && mount --bind /dev/$device {root}/dev/$device
            done
            mkdir -p {root}/dev/shm
            mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs {root}/dev/shm
            mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs {root}/tmp
            mount -t proc proc {root}/proc
            mount -o remount,ro,bind {root}
            mount -t sysfs -o ro sysfs {root}/sys
            exec setpriv --no-new-privs "$@"
        """
        command = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        command += [
            "sh",
            "-euc",
            mounts,
            "sh",
            *self._as_user,
            *self._enter,
            *image["Entrypoint"],
            *arguments,
        ]
        super().__init__(folder, [part.replace("{", "{{").replace("}", "}}") for part in command])
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def first_process(self) -> psutil.Process:
        """The process that has id 1 in the container."""
        [child] = wait_until(lambda: psutil.Process(self.process.pid).children())
        return child

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Like `docker exec`."""
        enter = ["nsenter", f"--target={self.first_process().pid}", "--mount", "--pid", "--ipc"]
        return subprocess.run(
            [*enter, *self._as_user, *self._enter, *command], capture_output=True, text=True, check=False
        )

    def stop(self, number: int = signal.SIGTERM, seconds: float = 120.0) -> int:
        """Like `docker stop`; returns the exit code."""
        if self.process.poll() is None:
            self.first_process().send_signal(number)
        return self.process.wait(seconds)


def run(command: list[str], stderr: int | None = subprocess.STDOUT) -> str:
    """Run a program and return its output; if it fails, the error shows the output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
    return done.stdout


def _beside(path: str) -> str:
    """The files of a local index, which are next to its pages."""
    parent = Path(path).parent
    return str(parent) if Path(path).name == "simple" else path
