"""Fixtures for what stands around the service: instances on ports of their own, and nginx before them."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.nginx import Nginx
from tests.service import Service, free_port


class Instance(Service):
    """A service that can be started again on the port it had."""

    def __init__(self, folder: Path, port: int | None = None, **settings: str) -> None:
        fixed = port or free_port()
        super().__init__(folder, **{"DEVICE": "cpu"} | settings | {"PORT": str(fixed)})
        self.port = fixed
        self.url = f"http://127.0.0.1:{fixed}"

    def kill(self) -> None:
        """`kill -9` for every process of it at once, as when a machine is lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start_instance(tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    """`start_instance(port)`; all end with the test."""
    running: list[Instance] = []

    def begin(port: int | None = None, **settings: str) -> Instance:
        running.append(Instance(tmp_path, port, **settings))
        return running[-1]

    yield begin
    for instance in running:
        if instance.process.poll() is None:
            instance.stop()


@pytest.fixture
def start_nginx(tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """`start_nginx(ports)`: the shipped configuration before these ports."""
    running: list[Nginx] = []

    def begin(ports: list[int], **replacements: str) -> Nginx:
        running.append(Nginx(tmp_path, ports, **replacements))
        return running[-1]

    yield begin
    for nginx in running:
        nginx.stop()
