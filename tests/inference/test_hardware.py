"""What is known of CUDA without torch."""

import ctypes
import ctypes.util
import importlib.metadata
from types import SimpleNamespace

import pytest

from embedding_service.inference import hardware

INSTALLED = {"torch": "2.13.0+cu130", "driver": "libcuda.so.1", "code": 0, "visible": None}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, None),
        ({"torch": "2.13.0"}, None),
        ({"torch": "2.13.0+cpu"}, "the installed torch was built without CUDA"),
        ({"visible": "-1"}, "CUDA_VISIBLE_DEVICES='-1' hides every device"),
        ({"driver": None}, "the NVIDIA driver (libcuda) is not installed"),
        ({"code": 100}, "the NVIDIA driver finds no device"),
        # A driver in trouble is for torch to judge.
        ({"code": 999}, None),
        ({"torch": "2.13.0+rocm7", "driver": None}, None),
    ],
    ids=str,
)
def test_cuda_is_ruled_out_only_if_it_is_certain(monkeypatch, found, reason):
    machine = INSTALLED | found
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: machine["torch"])
    monkeypatch.setattr(ctypes.util, "find_library", lambda _name: machine["driver"])
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(cuInit=lambda _flags: machine["code"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if machine["visible"]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", machine["visible"])
    assert hardware.no_cuda() == reason
