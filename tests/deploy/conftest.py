"""Fixtures for deployments: instances on their own ports, and nginx in front of them."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.nginx import Nginx
from tests.service import Service, free_port


class Instance(Service):
    """A service that can be restarted on the same port."""

    def __init__(self, folder: Path, port: int | None = None, **settings: str) -> None:
        fixed = port or free_port()
        super().__init__(folder, **{"DEVICE": "cpu"} | settings | {"PORT": str(fixed)})
        self.port = fixed
        self.url = f"http://127.0.0.1:{fixed}"

    def kill(self) -> None:
        """Send `kill -9` to all its processes at once, as if its machine were lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start_instance(own_process: None, tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    """`start_instance(port)`; all are stopped after the test."""
    running: list[Instance] = []

    def begin(port: int | None = None, **settings: str) -> Instance:
        running.append(Instance(tmp_path, port, **settings))
        return running[-1]

    yield begin
    for instance in running:
        if instance.process.poll() is None:
            instance.stop()


@pytest.fixture
def start_nginx(own_process: None, tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """`start_nginx(ports)`: nginx with the shipped configuration in front of these ports."""
    running: list[Nginx] = []

    def begin(ports: list[int], **replacements: str) -> Nginx:
        running.append(Nginx(tmp_path, ports, **replacements))
        return running[-1]

    yield begin
    for nginx in running:
        nginx.stop()
