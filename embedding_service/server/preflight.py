"""Startup checks that run before the service listens and need no model."""

import errno
import importlib.util
import logging
import socket
from pathlib import Path

from embedding_service.errors import StartupError
from embedding_service.inference import source
from embedding_service.inference.fingerprint import effective_prompts
from embedding_service.inference.hardware import no_cuda
from embedding_service.inference.model_files import Listing
from embedding_service.settings.config import Config
from embedding_service.settings.environment import Environment
from embedding_service.web import keys

log = logging.getLogger(__name__)


def check_model(settings: Config) -> None:
    """Raises StartupError if the model, the device or the number format is certain to fail."""
    source.check(settings.embedding_model)
    is_int8 = settings.dtype == "int8"
    if is_int8 and importlib.util.find_spec("nncf") is None:
        raise StartupError("DTYPE=int8 needs nncf: pip install nncf")
    if (is_int8 or settings.backend == "openvino") and importlib.util.find_spec("openvino") is None:
        raise StartupError("BACKEND=openvino and DTYPE=int8 need openvino, which is for x86 CPUs")
    if settings.int8_ranges:
        # With numpy, which takes time before the model begins to load.
        from embedding_service.quantization import read_ranges

        read_ranges(settings.int8_ranges)
    name, folder = settings.default_prompt_name, Path(settings.embedding_model).expanduser()
    if name and name not in settings.prompts and folder.is_dir():
        known, _ = effective_prompts(Listing.of(folder), settings.prompts, name)
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise StartupError(f"DEFAULT_PROMPT_NAME={name!r} is not a prompt; there are: {there}")
    if not settings.cpu_fallback and any(device.startswith("cuda") for device in settings.devices):
        reason = no_cuda()
        if reason is not None:
            raise StartupError(
                f"DEVICE={settings.device}, but {reason}, and CPU_FALLBACK=false. "
                "Start with --gpus all, or set DEVICE=cpu"
            )


def check(started: Environment) -> None:
    """All of these checks but the addresses; also logs the warnings. Raises StartupError."""
    for warning in started.warnings:
        log.warning("%s", warning)
    settings = started.settings
    keys.ring(settings.api_keys, settings.api_keys_file).check()
    check_model(settings)
    if started.sends_traces:
        check_traces(started.traces_protocol)


def check_traces(protocol: str) -> None:
    """Raises StartupError if OpenTelemetry is not installed, or is to send spans in another protocol."""
    if importlib.util.find_spec("opentelemetry") is None:
        raise StartupError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        )
    if protocol not in ("", "http/protobuf"):
        raise StartupError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not supported: spans are sent as http/protobuf, "
            "usually to port 4318. Unset it, or set OTEL_SDK_DISABLED=true"
        )


def check_address(host: str, port: int) -> None:
    """Raises StartupError if the service cannot listen on this address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        # Like gunicorn, so that closing connections of a previous service do not get in the way.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(1)
        except OSError as error:
            raise StartupError(_why_not(host, port, error)) from None


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"PORT={port} is in use at {host}: stop the other process, or set PORT to another port"
    if error.errno == errno.EACCES:
        return f"PORT={port} needs privileges, as ports below 1024 do: set PORT to another port"
    if isinstance(error, socket.gaierror):
        hint = (
            "; conda sets HOST to the name of its platform: unset it, or use --host"
            if "conda" in host
            else ""
        )
        return f"HOST={host!r} cannot be resolved to an address: {error.strerror}{hint}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"HOST={host!r} is not an address of this machine"
    return f"HOST={host!r}, PORT={port}: {error.strerror}"
