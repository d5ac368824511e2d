"""The shipped Prometheus configuration, alerts and dashboard, in a real Prometheus with the real service."""

import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import requests
import yaml

from embedding_service.observability import metrics
from tests.conftest import ROOT, require_program
from tests.service import Service, free_port, wait_until

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
KEY = "the-key-of-prometheus"

KEDA = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "keda.yaml").read_text())
(SCALING,) = (trigger["metadata"] for trigger in KEDA["spec"]["triggers"])

NAME = re.compile(r"\bembedding_\w+")
METRICS = [
    described
    for name, value in vars(metrics).items()
    if name.isupper() and name[0] != "_"
    for described in value.describe()
]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
KNOWN = {metric.name + suffix for metric in METRICS for suffix in SUFFIXES[metric.type]}


def panels() -> list[dict]:
    return json.loads(DASHBOARD.read_text())["panels"]


def queries() -> list[str]:
    """Every query of the dashboard, as Grafana would send it."""
    written = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    return [q.replace("$job", "embedding-service").replace("$__rate_interval", "20s") for q in written]


def alerts() -> list[dict]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = require_program("promtool", "prometheus")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_dashboard_and_the_alerts_use_metrics_that_exist():
    for query in [*queries(), SCALING["query"], *(rule["expr"] for rule in alerts())]:
        assert set(NAME.findall(query)) <= KNOWN, query


def test_the_dashboard_shows_every_metric():
    shown = {name for query in queries() for name in NAME.findall(query)}
    for metric in METRICS:
        assert any(name.startswith(metric.name) for name in shown), metric.name


def test_panels_do_not_overlap():
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_promtool_accepts_the_configuration_and_the_rules():
    done = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


POST = 'job="embedding-service",instance="a",method="POST",route="/embed"'
ME = 'job="embedding-service",instance="a"'

# The metrics that the service would have during a fault, per minute, and the alert that fires.
FAULTS = {
    "EmbeddingServiceDown": {f"up{{{ME}}}": "1 1 0x60"},
    "EmbeddingModelNotReady": {f"embedding_model_ready{{{ME}}}": "0x60"},
    "EmbeddingModelLost": {f"embedding_model_ready{{{ME}}}": "2x10 1x50"},
    "EmbeddingModelRestarts": {f"embedding_model_restarts_total{{{ME}}}": "0x50 1x10"},
    "EmbeddingErrors": {
        f'embedding_requests_total{{{POST},status="200"}}': "0+98x60",
        f'embedding_requests_total{{{POST},status="500"}}': "0+2x60",
    },
    "EmbeddingOverloaded": {
        f'embedding_requests_total{{{POST},status="200"}}': "0+90x60",
        f'embedding_requests_total{{{POST},status="429"}}': "0+10x60",
    },
    "EmbeddingSlowQueue": {
        f'embedding_phase_duration_seconds_bucket{{{ME},phase="queue",le="1.0"}}': "0x60",
        f'embedding_phase_duration_seconds_bucket{{{ME},phase="queue",le="5.0"}}': "0+100x60",
        f'embedding_phase_duration_seconds_bucket{{{ME},phase="queue",le="+Inf"}}': "0+100x60",
    },
    "EmbeddingOutOfMemory": {f"embedding_out_of_memory_halvings_total{{{ME}}}": "0x50 3x10"},
    "EmbeddingNonFiniteVectors": {f"embedding_nonfinite_recomputations_total{{{ME}}}": "0x50 1x10"},
    "EmbeddingTextsTruncated": {
        f"embedding_truncated_texts_total{{{ME}}}": "0+20x180",
        f"embedding_batch_texts_sum{{{ME}}}": "0+100x180",
    },
    "EmbeddingGpuHot": {f'embedding_gpu_temperature_celsius{{{ME},gpu="cuda:0"}}': "91x60"},
}
HEALTHY = {
    f"up{{{ME}}}": "1x180",
    f"embedding_model_ready{{{ME}}}": "0 0 1x180",
    f"embedding_model_restarts_total{{{ME}}}": "4x180",
    f'embedding_requests_total{{{POST},status="200"}}': "0+1000x180",
    f'embedding_requests_total{{{POST},status="500"}}': "0+1x180",
    f'embedding_requests_total{{{POST},status="429"}}': "0+5x180",
    f'embedding_requests_total{{{ME},method="GET",route="/health",status="503"}}': "0+1000x180",
    f'embedding_phase_duration_seconds_bucket{{{ME},phase="queue",le="1.0"}}': "0+100x180",
    f'embedding_phase_duration_seconds_bucket{{{ME},phase="queue",le="+Inf"}}': "0+100x180",
    f"embedding_out_of_memory_halvings_total{{{ME}}}": "0x180",
    f"embedding_nonfinite_recomputations_total{{{ME}}}": "0x180",
    f"embedding_truncated_texts_total{{{ME}}}": "0+1x180",
    f"embedding_batch_texts_sum{{{ME}}}": "0+1000x180",
    f'embedding_gpu_temperature_celsius{{{ME},gpu="cuda:0"}}': "70x180",
}


def test_every_alert_has_a_fault_in_the_table():
    assert set(FAULTS) == {rule["alert"] for rule in alerts()}


def rule_test(
    tmp_path: Path, series: dict[str, str], queries: list[dict]
) -> subprocess.CompletedProcess[str]:
    """Run the rules over the series with promtool, and compare the firing alerts at the end."""
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    given = [{"series": name, "values": values} for name, values in series.items()]
    case = {"interval": "1m", "input_series": given, "promql_expr_test": queries}
    file = tmp_path / "test.json"
    file.write_text(json.dumps({"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [case]}))
    return promtool("test", "rules", file)


def test_keda_gets_one_number_the_requests_of_all_pods(tmp_path):
    """It refuses a query with more than one result."""
    series = {
        'embedding_requests_waiting{pod="embedding-service-5f7c-a",job="kubernetes-pods"}': "5x10",
        'embedding_requests_waiting{pod="embedding-service-5f7c-b",job="kubernetes-pods"}': "7x10",
        'embedding_requests_running{pod="embedding-service-5f7c-a",job="kubernetes-pods"}': "1x10",
        'embedding_requests_running{pod="another-service-5f7c-a",job="kubernetes-pods"}': "100x10",
    }
    query = {"expr": SCALING["query"], "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 13}]}
    done = rule_test(tmp_path, series, [query])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scaled_object_has_fields_that_keda_knows():
    """Names and types are those of KEDA's CustomResourceDefinition and of its Prometheus scaler."""
    assert (KEDA["apiVersion"], KEDA["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    deployment = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "base" / "deployment.yaml").read_text())
    assert KEDA["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    assert set(KEDA["spec"]) == {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers"}
    assert 0 <= KEDA["spec"]["minReplicaCount"] <= KEDA["spec"]["maxReplicaCount"]
    assert [set(trigger) for trigger in KEDA["spec"]["triggers"]] == [{"type", "metadata"}]
    assert KEDA["spec"]["triggers"][0]["type"] == "prometheus"
    # All of these are strings, also numbers.
    assert set(SCALING) == {"serverAddress", "query", "threshold"}
    assert all(isinstance(value, str) for value in SCALING.values()) and float(SCALING["threshold"]) > 0


def firing(minutes: int, **matches: str) -> dict:
    """How many of the matching alerts fire at this minute: 1 or none."""
    selector = ",".join(f'{name}="{value}"' for name, value in ({"alertstate": "firing"} | matches).items())
    return {"expr": f"count(ALERTS{{{selector}}})", "eval_time": f"{minutes}m", "exp_samples": []}


@pytest.mark.parametrize("alert", FAULTS)
def test_each_alert_fires_during_its_fault(tmp_path, alert):
    end = 170 if alert == "EmbeddingTextsTruncated" else 55
    query = firing(end, alertname=alert) | {"exp_samples": [{"labels": "{}", "value": 1}]}
    done = rule_test(tmp_path, FAULTS[alert], [query])
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_fires_in_a_healthy_service(tmp_path):
    done = rule_test(tmp_path, HEALTHY, [firing(minutes) for minutes in range(0, 180, 5)])
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A running Prometheus with the shipped configuration, except for target, key and scrape interval."""

    def __init__(self, folder: Path, service: Service) -> None:
        program = require_program("prometheus", "prometheus")
        shutil.copy(PROMETHEUS / "alerts.yml", folder)
        settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "key").write_text(KEY)
        (job,) = settings["scrape_configs"]
        job["authorization"] = {"credentials_file": "key"}
        labels = {"pod": "embedding-service-5f7c-a"}  # which Prometheus adds in a cluster
        job["static_configs"] = [{"targets": [f"127.0.0.1:{service.port}"], "labels": labels}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )

    def query(self, expression: str) -> list[float]:
        """The values of an instant query."""
        body = self._get("query", query=expression)
        assert body["status"] == "success", f"{expression}: {body}"
        return [float(series["value"][1]) for series in body["data"]["result"]]

    def rules(self) -> list[dict]:
        return [rule for group in self._get("rules")["data"]["groups"] for rule in group["rules"]]

    def is_up(self) -> bool:
        try:
            return self.query('up{job="embedding-service"}') == [1.0]
        except requests.RequestException:  # it does not listen yet, or is not ready and answers in plain text
            return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _get(self, path: str, **parameters: str) -> dict:
        return requests.get(f"{self._url}/{path}", params=parameters, timeout=60).json()


@pytest.fixture(scope="module")
def scraped(own_process, tmp_path_factory):
    """A service with a key that has served requests for a while, and a Prometheus that has scraped it."""
    require_program("prometheus", "prometheus")
    service = Service(tmp_path_factory.mktemp("service"), API_KEYS=KEY)
    prometheus = None
    try:
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), service)
        service.wait_ready()
        wait_until(prometheus.is_up, "a first scrape")
        yield service, prometheus
    finally:
        if prometheus is not None:
            prometheus.stop()
        service.stop()


def serve_for(service: Service, seconds: float) -> None:
    """Send a few requests of each kind for as long as Prometheus needs to see rates."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = service.post(
            "/embed", {"texts": ["short", "longer " * 20, "cut " * 400]}, headers={"X-API-Key": KEY}
        )
        assert answer.status_code == 200


def test_every_query_of_the_dashboard_returns_finite_series(scraped):
    service, prometheus = scraped
    wanted = [query for query in queries() if "embedding_gpu_" not in query]
    missing = wanted

    def all_there() -> bool:
        nonlocal missing
        serve_for(service, 1)
        found = {query: prometheus.query(query) for query in missing}
        missing = [
            query for query, values in found.items() if not values or not all(map(math.isfinite, values))
        ]
        return not missing

    try:
        wait_until(all_there, "a series for every query")
    except AssertionError as error:
        raise AssertionError(f"{error}; without: {missing}") from None


def test_the_query_of_keda_returns_one_finite_number(scraped):
    _, prometheus = scraped
    (value,) = wait_until(lambda: prometheus.query(SCALING["query"]), "the gauges of requests")
    assert math.isfinite(value) and value >= 0


def test_the_gpu_queries_are_valid_without_a_gpu(scraped):
    _, prometheus = scraped
    wanted = [query for query in queries() if "embedding_gpu_" in query]
    assert len(wanted) == 4
    for query in wanted:
        assert all(map(math.isfinite, prometheus.query(query)))


def test_prometheus_evaluates_every_alert_and_none_fires(scraped):
    _, prometheus = scraped

    def evaluated():
        return all(rule["health"] == "ok" for rule in prometheus.rules())

    wait_until(evaluated, "an evaluation of every rule")
    rules = prometheus.rules()
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alerts()}
    assert {rule["state"] for rule in rules if rule["duration"] == 0} == {"inactive"}


def test_the_series_of_every_alert_exist(scraped):
    """A rule for a metric or a label that the service does not have would never fire."""
    _, prometheus = scraped
    for rule in alerts():
        selectors = re.findall(r"\b(embedding_\w+(?:\{[^}]*\})?)", rule["expr"])
        for selector in selectors:
            if "embedding_gpu_" not in selector:
                assert prometheus.query(f"count({selector})")[0] >= 1, selector
