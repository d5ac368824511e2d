"""The systemd unit is valid, grants few rights, and matches how the service starts, stops and fails."""

import configparser
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_program
from tests.service import ROOT, Service

UNIT = ROOT / "deploy" / "systemd" / "embedding-service.service"
INSTALLED = "/opt/embedding-service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, installed for this repository's folder."""
    installed = tmp_path / UNIT.name
    text = UNIT.read_text().replace(f"{INSTALLED}/.venv/bin/python", sys.executable)
    installed.write_text(text.replace(INSTALLED, str(ROOT)))
    return installed


@pytest.fixture
def section(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(unit)
    return parser["Service"]


def test_is_valid(unit: Path) -> None:
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_verification_would_notice_a_misspelt_setting(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("KillMode=", "KilMode="))
    assert "Unknown key 'KilMode'" in analyze("verify", str(unit)).stderr


def test_is_hardly_exposed(unit: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=25", str(unit))
    assert done.returncode == 0, done.stdout[-300:]


def test_its_command_reports_readiness_and_stops_in_time(
    section: configparser.SectionProxy, tmp_path: Path, start_without_model
) -> None:
    assert section["Type"] == "notify"
    notified = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notified))
        manager.settimeout(180)
        service: Service = start_without_model(shlex.split(section["ExecStart"]), NOTIFY_SOCKET=str(notified))
        assert manager.recv(1000).startswith(b"READY=1")
        assert service.health() is not None
    assert service.stop(seconds=float(section["TimeoutStopSec"])) == 0


def test_an_invalid_setting_is_not_retried(section: configparser.SectionProxy, start) -> None:
    service: Service = start(shlex.split(section["ExecStart"]), BATCH_SIZE="none")
    assert service.process.wait(120) == int(section["RestartPreventExitStatus"])


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = require_program("systemd-analyze", "systemd")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
