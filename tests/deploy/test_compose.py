"""The compose file is valid by the specification's schema, and consistent with the files that it mounts."""

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

import config
from tests.conftest import require_program
from tests.deploy.nginx import SHIPPED
from tests.service import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def test_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_one_profile_has_a_gpu_and_the_other_does_not_need_one(services: dict[str, Any]) -> None:
    gpu, cpu = services["embedding-gpu"], services["embedding-cpu"]
    assert (gpu["profiles"], cpu["profiles"]) == (["gpu"], ["cpu"])
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in cpu


@pytest.mark.parametrize("name", ["embedding-gpu", "embedding-cpu"])
def test_instances_have_few_rights_and_time_to_drain(services: dict[str, Any], name: str) -> None:
    instance = services[name]
    assert instance["read_only"] is True and instance["cap_drop"] == ["ALL"]
    settings = config.load(instance["environment"])
    assert int(instance["stop_grace_period"].rstrip("s")) > settings.graceful_timeout_seconds
    assert settings.device == {"gpu": "cuda", "cpu": "cpu"}[name.removeprefix("embedding-")]


def test_nginx_and_prometheus_reach_the_instances(services: dict[str, Any]) -> None:
    for name in ("embedding-gpu", "embedding-cpu"):
        assert services[name]["networks"]["inside"]["aliases"] == ["embedding"]
        assert "ports" not in services[name], "only nginx is reached from outside"
    assert "server embedding:8001 max_fails=0;" in (DEPLOY / "nginx.conf").read_text()
    [job] = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text())["scrape_configs"]
    assert job["dns_sd_configs"] == [{"names": ["embedding"], "type": "A", "port": 8001}]


def test_prometheus_accepts_its_configuration() -> None:
    promtool = require_program("promtool", "prometheus")
    command = [promtool, "check", "config", str(DEPLOY / "prometheus" / "compose.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_mounted_exists(compose: dict[str, Any], services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    sources = {mount.split(":")[0] for mount in mounts}
    files = {source for source in sources if source.startswith("./")}
    assert sources - files == set(compose["volumes"])
    missing = {source for source in files if not (DEPLOY / source).exists()}
    assert missing == {"./tls"}, "the certificate is the user's"


def test_networks_and_dependencies_exist(compose: dict[str, Any], services: dict[str, Any]) -> None:
    assert {name for service in services.values() for name in service["networks"]} == set(compose["networks"])
    assert {name for service in services.values() for name in service.get("depends_on", [])} <= set(services)


def test_nginx_finds_the_tested_configuration_its_ports_and_its_certificate(services: dict[str, Any]) -> None:
    nginx, text = services["nginx"], SHIPPED.read_text()
    sources = {target: DEPLOY / source for source, target, _ in (v.split(":") for v in nginx["volumes"])}
    assert sources["/etc/nginx/nginx.conf"] == SHIPPED
    assert {f"{port}:{port}" for port in re.findall(r"listen (\d+)", text)} == set(nginx["ports"])
    for written in re.findall(r"^ *(?:ssl_certificate|ssl_certificate_key) (.*)/.*;", text, re.MULTILINE):
        assert written in sources
    # The root is read-only, and the image's log files are standard output and error.
    assert "pid /run/nginx.pid;" in text and {"/run", "/var/cache/nginx"} == set(nginx["tmpfs"])


def test_prometheus_reads_the_file_that_was_checked(services: dict[str, Any]) -> None:
    prometheus = services["prometheus"]
    assert "./prometheus:/etc/prometheus:ro" in prometheus["volumes"]
    assert "--config.file=/etc/prometheus/compose.yml" in prometheus["command"]


def test_grafana_has_the_data_source_of_the_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "embedding-service.yml").read_text())[
        "providers"
    ]
    assert f"{provider['options']['path']}/embedding-service.json" in COMPOSE.read_text()
