"""Metrics: complete from the first scrape, correct across processes and their deaths, cheap, documented."""

import contextlib
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from embedding_service.engine import EmbedRequest
from embedding_service.errors import StartupError
from embedding_service.inference import sampling
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.runtime import OutOfMemory
from embedding_service.observability import metrics, tei_metrics
from embedding_service.sharing import runtime_folder
from tests.conftest import ROOT
from tests.inference.fake_runtime import DIMENSION, FakeRuntime
from tests.service import Service, wait_until

ALL = {value._name: value for name, value in vars(metrics).items() if name.isupper() and name[0] != "_"}

# Metrics that need a loaded model or a GPU.
LATER = {"embedding_model_info", *(name for name in ALL if "_gpu_" in name or "_process_" in name)}


class Scraped:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with this name and, among others, these labels."""
        return sum(s.value for s in self.samples(name) if labels.items() <= s.labels.items())

    def samples(self, name: str) -> list:
        return [s for family in self.families.values() for s in family.samples if s.name == name]


def scrape(service: Service) -> Scraped:
    answer = requests.get(f"{service.url}/metrics", timeout=60)
    assert answer.status_code == 200
    return Scraped(answer.text)


def embedded(scraped: Scraped) -> float:
    return scraped.value("embedding_requests_total", route="/embed", status="200")


def metrics_folder(service: Service) -> Path:
    """The folder that the service's processes share, from the supervisor's arguments."""
    return Path(service.supervisor().cmdline()[3]) / "metrics"


@pytest.fixture(scope="module")
def two_workers(own_process, tmp_path_factory):
    """A service with two web workers."""
    running = Service(tmp_path_factory.mktemp("metrics"), WEB_CONCURRENCY="2")
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def test_the_first_scrape_is_complete_before_there_is_a_model(start_without_model, tmp_path):
    held = tmp_path / "held"
    held.touch()
    running = start_without_model(HELD=str(held))

    def answered():
        with contextlib.suppress(requests.ConnectionError):
            return scrape(running)

    first = wait_until(answered, "a scrape")
    assert set(first.families) == set(ALL) - LATER
    for name in set(ALL) - LATER - {"embedding_build_info"}:
        assert first.families[name].samples, name
        assert {s.value for s in first.families[name].samples} == {0.0}, name
    statuses = {
        s.labels["status"]
        for s in first.samples("embedding_requests_total")
        if s.labels["route"] == "/embed" and s.labels["method"] == "POST"
    }
    assert statuses >= {"200", "400", "401", "413", "415", "422", "424", "429", "500", "503", "504"}
    phases = {s.labels["phase"] for s in first.samples("embedding_phase_duration_seconds_count")}
    assert phases == {"tokenization", "queue", "inference"}


def test_every_request_of_every_worker_is_counted_once(two_workers):
    service = two_workers
    before = scrape(service)
    requests_sent = 60

    def ask(number: int):
        # All different: identical texts that wait together are computed once.
        texts = [f"short {number}", f"{number} is a somewhat longer text " * 4]
        return service.post("/embed", {"texts": texts})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(requests_sent)))
    tokens = sum(answer.json()["usage"]["tokens"] for answer in answers)
    service.post("/embed", {"texts": ["word " * 600, "fits", "word " * 700]})
    for _ in range(3):
        service.post("/embed", {"texts": []})

    # Each scrape is a new connection, so both workers answer some, and must agree.
    scrapes = [scrape(service) for _ in range(10)]
    assert {embedded(s) - embedded(before) for s in scrapes} == {requests_sent + 1}
    after = scrapes[-1]

    def gained(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert gained("embedding_requests_total", route="/embed", status="400") == 3
    assert gained("embedding_request_duration_seconds_count", route="/embed") == requests_sent + 4
    for phase in ("tokenization", "queue", "inference"):
        assert gained("embedding_phase_duration_seconds_count", phase=phase) == requests_sent + 1
    assert gained("embedding_phase_duration_seconds_sum", phase="inference") > 0
    assert gained("embedding_batch_texts_sum") == 2 * requests_sent + 3
    assert gained("embedding_batch_tokens_sum") == tokens + 256 * 2 + 3
    assert gained("embedding_batch_texts_count") == gained("embedding_batch_duration_seconds_count")
    assert gained("embedding_truncated_texts_total") == 2
    info = after.samples("embedding_model_info")[0].labels
    assert (info["model"], info["device"], info["dimension"]) == (
        "sentence-transformers/all-MiniLM-L6-v2",
        "cpu",
        "384",
    )
    assert after.value("embedding_model_ready") == 1


@pytest.mark.parametrize("overflow", ["mean", "chunks"])
def test_the_pieces_of_long_texts_are_counted(two_workers, overflow):
    service = two_workers
    before = scrape(service)
    body = service.post("/embed", {"texts": ["word " * 600, "fits"], "overflow": overflow}).json()
    assert body["usage"]["chunks"] == 4
    assert scrape(service).value("embedding_chunks_total") - before.value("embedding_chunks_total") == 3


def test_texts_without_a_vector_are_counted(two_workers):
    service = two_workers
    before = scrape(service)
    body = {"texts": ["word " * 600, "fits", "word " * 700], "overflow": "error", "on_error": "null"}
    assert len(service.post("/embed", body).json()["errors"]) == 2
    name = "embedding_failed_texts_total"
    assert scrape(service).value(name) - before.value(name) == 2


def test_the_number_of_labels_is_bounded(two_workers):
    service = two_workers
    for number in range(30):
        requests.get(f"{service.url}/nothing/{number}?key={number}", timeout=60)
        requests.request(f"MADEUP{number}", f"{service.url}/embed", timeout=60)
        requests.request("DELETE", f"{service.url}/embed", timeout=60)
    after = scrape(service)
    routes = {s.labels["route"] for s in after.samples("embedding_requests_total")}
    methods = {s.labels["method"] for s in after.samples("embedding_requests_total")}
    assert not [route for route in routes if "nothing" in route]
    assert methods <= {"GET", "HEAD", "POST", "DELETE", "OPTIONS", "other"}
    assert after.value("embedding_requests_total", route="unmatched", method="GET", status="404") == 30
    assert after.value("embedding_requests_total", route="unmatched", method="other", status="405") == 30
    assert after.value("embedding_requests_total", route="unmatched", method="DELETE", status="405") == 30


def test_openmetrics_is_sent_on_request(two_workers):
    service = two_workers
    answer = requests.get(
        f"{service.url}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
        timeout=60,
    )
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_counts_survive_the_death_of_every_process_and_gauges_do_not(two_workers):
    service = two_workers
    service.post("/embed", {"texts": "once"})
    before = scrape(service)
    folder = metrics_folder(service)
    files = len(list(folder.iterdir()))

    for end in ("kill", "kill", "reload"):
        old = {worker.pid for worker in service.web_workers()}
        if end == "reload":
            service.process.send_signal(signal.SIGHUP)
        else:
            for worker in service.web_workers():
                worker.kill()

        def replaced(old=old):
            try:
                workers = {worker.pid for worker in service.web_workers()}
            except psutil.Error:  # one is gone and not yet reaped
                return False
            return len(workers) == 2 and not workers & old and service.health()

        wait_until(replaced, "two new workers")
        assert embedded(scrape(service)) == embedded(before)
    service.wait_ready()

    with ThreadPoolExecutor(1) as pool:
        texts = [f"{number} {'many words to wait for ' * 60}" for number in range(256)]
        bulk = pool.submit(service.post, "/embed", {"texts": texts})
        wait_until(lambda: scrape(service).value("embedding_queued_tokens") > 10_000, "a queue")
        service.model_process().kill()
        assert bulk.result(120).status_code == 503

    def without_model():
        scraped = scrape(service)
        return scraped if scraped.value("embedding_model_ready") == 0 else None

    # Not at once: a dying process closes its sockets before it releases its slot.
    lost = wait_until(without_model, "a scrape without the model")
    assert lost.value("embedding_queued_tokens") == 0
    assert not lost.samples("embedding_model_info")
    assert lost.value("embedding_batch_texts_count") >= before.value("embedding_batch_texts_count")
    wait_until(lambda: scrape(service).value("embedding_model_restarts_total") == 1, "a restart")
    service.wait_ready()

    service.post("/embed", {"texts": "again"})
    after = scrape(service)
    assert embedded(after) == embedded(before) + 1
    assert after.value("embedding_batch_texts_count") > before.value("embedding_batch_texts_count")
    assert after.value("embedding_model_ready") == 1
    assert after.value("embedding_requests_total", route="/embed", status="503") == 1
    # The files were those of three processes. Eleven have run, at most six of them at once, around the
    # reload. Without slots there would be as many files for each.
    assert len(list(folder.iterdir())) <= files * 6 // 3


def test_the_folder_is_private_and_removed_with_the_service(start_without_model):
    service = start_without_model()
    wait_until(service.health, "an answer")
    folder = wait_until(lambda: _folder_or_none(service), "the model process")
    assert folder.parent.stat().st_mode & 0o077 == 0
    assert service.stop() == 0
    assert not folder.parent.exists()


def test_no_space_for_the_folder_gets_one_line(start, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    running = start()
    assert running.process.wait(120) == 78
    assert running.log().startswith("No folder for the service's sockets can be made")
    assert len(running.log().splitlines()) == 1


def test_a_full_disk_is_detected_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(runtime_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(StartupError, match="less than 16 MiB are free"):
        runtime_folder.RuntimeFolder.make()
    assert not list(tmp_path.iterdir())


def test_without_shared_memory_the_folder_is_on_disk(monkeypatch, tmp_path):
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(runtime_folder, "MEMORY_FOLDER", str(tmp_path / "missing"))
    monkeypatch.setattr(runtime_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = runtime_folder.RuntimeFolder.make()
    assert folder.path.parent == tmp_path
    assert folder.metrics.is_dir()


def test_a_path_too_long_for_a_socket_gets_one_line(start, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    running = start()
    assert running.process.wait(120) == 78
    assert "too long for a socket; set TMPDIR to a shorter one" in running.log()
    assert "Traceback" not in running.log()
    assert not list(long.iterdir())


def _folder_or_none(service: Service) -> Path | None:
    try:
        return metrics_folder(service)
    except (AssertionError, psutil.Error):
        return None


def test_a_preloaded_app_counts_in_each_of_its_workers(start_without_model):
    command = [sys.executable, "-m", "gunicorn", "--preload", "-w", "2", "-b", "127.0.0.1:{port}", "app:app"]
    service = start_without_model(command).wait_ready()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda number: service.post("/embed", {"texts": f"hello {number}"}), range(40))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert {embedded(scrape(service)) for _ in range(10)} == {40}
    assert scrape(service).value("embedding_batch_texts_sum") == 40


def test_check_config_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "gunicorn", "--check-config", "app:app"]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_without_a_folder_one_process_counts_for_itself(two_workers):
    answer, content_type = metrics.exposition("")
    assert content_type.startswith("text/plain")
    assert set(Scraped(answer.decode()).families) >= set(ALL) - LATER


def run(texts, on_forward=lambda _batch: None):
    """Embed the texts with a batcher and this forward; returns the outcome and how much each metric grew."""
    outcomes = []
    before = Scraped(metrics.exposition("")[0].decode())
    batcher = Batcher(FakeRuntime(on_forward=on_forward), max_queued_tokens=10_000)
    try:
        batcher.submit([(0, EmbedRequest(texts=texts, deadline=float("inf")))], outcomes.extend)
        wait_until(lambda: outcomes, "an outcome")
    finally:
        batcher.close("the test is over")
    after = Scraped(metrics.exposition("")[0].decode())
    return outcomes[0][1], lambda name: after.value(name) - before.value(name)


def test_padding_is_counted():
    _, gained = run(["1 a", "2 b", "4 c"])
    assert gained("embedding_batch_tokens_sum") == 7
    assert gained("embedding_padding_tokens_total") == 3 * 4 - 7


def test_out_of_memory_halvings_are_counted():
    def forward(batch):
        if len(batch) > 1:
            raise OutOfMemory("injected")

    outcome, gained = run(["3 a", "3 b", "3 c", "3 d"], forward)
    assert len(outcome.vectors) == 4
    assert gained("embedding_out_of_memory_halvings_total") == 3
    assert gained("embedding_batch_texts_count") == 4


def test_recomputed_vectors_are_counted():
    outcome, gained = run(["3 a", "3 b"], lambda batch: np.full((len(batch), DIMENSION), np.nan, np.float32))
    assert np.isfinite(outcome.vectors).all()
    assert gained("embedding_nonfinite_recomputations_total") == 2


@pytest.fixture
def driver(monkeypatch):
    """A fake NVIDIA driver and GPU, which this machine may not have."""
    import pynvml
    import torch

    asked = []
    uuid = "5e1f0f0e-0000-1111-2222-333344445555"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=3 << 30, total=80 << 30)
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=42))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda handle, sensor: 61)
    return SimpleNamespace(pynvml=pynvml, asked=asked)


def test_a_gpu_is_sampled_with_the_queue(driver):
    gpu = sampling.find_gpu("cuda:1")
    assert driver.asked == ["GPU-5e1f0f0e-0000-1111-2222-333344445555"]
    sampler = sampling.Sampler(SimpleNamespace(queued_tokens=1234, requests=(5, 6)), gpu)
    try:

        def value(name: str, **labels: str) -> float:
            return Scraped(metrics.exposition("")[0].decode()).value(name, **labels)

        wait_until(lambda: value("embedding_gpu_temperature_celsius", gpu="cuda:1") == 61, "a sample")
        assert value("embedding_queued_tokens") == 1234
        assert (value("embedding_requests_waiting"), value("embedding_requests_running")) == (5, 6)
        assert value("embedding_gpu_memory_used_bytes", gpu="cuda:1") == 3 << 30
        assert value("embedding_gpu_memory_total_bytes", gpu="cuda:1") == 80 << 30
        assert value("embedding_gpu_utilization_ratio", gpu="cuda:1") == 0.42
    finally:
        sampler.close()


def test_values_that_a_gpu_does_not_report_are_left_out(driver, monkeypatch):
    def refuse(*_):
        raise driver.pynvml.NVMLError(driver.pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(driver.pynvml, "nvmlDeviceGetUtilizationRates", refuse)
    sampling.find_gpu("cuda:2").sample()
    after = Scraped(metrics.exposition("")[0].decode())
    assert after.value("embedding_gpu_temperature_celsius", gpu="cuda:2") == 61
    assert not [s for s in after.samples("embedding_gpu_utilization_ratio") if s.labels["gpu"] == "cuda:2"]


def test_a_missing_driver_is_not_an_error(driver, monkeypatch, caplog):
    def missing():
        raise driver.pynvml.NVMLError(driver.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(driver.pynvml, "nvmlInit", missing)
    assert sampling.find_gpu("cuda") is None
    assert "NVML does not answer" in caplog.text
    assert sampling.find_gpu("cpu") is None


COSTS = """
import sys, timeit
from pathlib import Path
from embedding_service.observability import metrics, tei_metrics
metrics.share(Path(sys.argv[1]))
def request():
    metrics.record_request(("/embed", "POST", 200), 0.012, (1.2, 3.4, 8.8), 1)
def batch():
    metrics.record_batch(32, 528, 1024, 0.01)
for hot in (request, batch):
    print(min(timeit.repeat(hot, number=1000, repeat=30)) * 1000)
"""


@pytest.mark.long
@pytest.mark.long  # it measures time
def test_counting_costs_little(tmp_path):
    """At most 40 µs for a request in a web worker and 30 µs for a batch, in the best of 30 runs."""
    command = [sys.executable, "-c", COSTS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(tmp_path.glob("counter_*.db"))
    request, batch = map(float, done.stdout.split())
    assert request < 40
    assert batch < 30


FORKS = """
import os, sys
from pathlib import Path
from embedding_service.observability import metrics, tei_metrics
folder = Path(sys.argv[1])
metrics.TRUNCATED_TEXTS.inc(1)  # before the folder is known
metrics.QUEUED_TOKENS.set(10)
metrics.share(folder)
metrics.TRUNCATED_TEXTS.inc(2)
child = os.fork()
metrics.TRUNCATED_TEXTS.inc(4)
if child == 0:
    metrics.share(folder)
    metrics.TRUNCATED_TEXTS.inc(8)
    metrics.QUEUED_TOKENS.set(100)
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
print(metrics.exposition("")[0].decode())
"""


def test_a_fork_counts_separately_and_nothing_is_counted_twice(tmp_path):
    command = [sys.executable, "-c", FORKS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    scraped = Scraped(done.stdout)
    assert scraped.value("embedding_truncated_texts_total") == 1 + 2 + 2 * 4 + 8
    assert scraped.value("embedding_queued_tokens") == 10


def test_the_documentation_describes_every_metric():
    rows = re.findall(
        r"^\| `(embedding_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$",
        (ROOT / "docs" / "metrics.md").read_text(),
        re.MULTILINE,
    )
    documented = {name: (kind, labels.strip(), text.strip()) for name, kind, labels, text in rows}
    expected = {
        name + ("_total" if metric._type == "counter" else ""): (
            metric._type,
            ", ".join(f"`{label}`" for label in metric._labelnames),
            metric._documentation,
        )
        for name, metric in ALL.items()
    }
    assert documented == expected


# What Text Embeddings Inference 1.9.3 has, after requests of each kind.
OF_TEI = {
    *("te_queue_size", "te_request_count", "te_request_success", "te_request_failure", "te_request_duration"),
    *("te_request_tokenization_duration", "te_request_queue_duration", "te_request_inference_duration"),
    *("te_embed_count", "te_embed_success", "te_batch_next_size", "te_batch_next_tokens"),
    *("te_embed_duration", "te_embed_tokenization_duration", "te_embed_queue_duration"),
    *("te_embed_inference_duration", "te_request_input_length"),
}


def scrape_as_tei(service: Service) -> Scraped:
    answer = requests.get(f"{service.url}/metrics?names=tei", timeout=60)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return Scraped(answer.text)


def test_metrics_under_teis_names_count_the_same(two_workers):
    service = two_workers
    before = scrape_as_tei(service)
    good = [("/embed", {"inputs": [f"text {number}", f"{number} more words"]}) for number in range(10)]
    good += [("/v1/embeddings", {"input": [f"as OpenAI {number}"]}) for number in range(5)]
    answers = [service.post(path, body) for path, body in good]
    tokens = sum(int(answer.headers["x-compute-tokens"]) for answer in answers)
    assert service.post("/embed_all", {"inputs": "token by token"}).status_code == 200
    for bad in ([], [[-1]], ["x"] * 5000):
        assert service.post("/", {"inputs": bad}).status_code >= 400
    # These do not embed.
    assert service.post("/tokenize", {"inputs": "a"}).status_code == 200
    assert service.post("/decode", {"ids": [101]}).status_code == 200
    assert service.post("/nothing", {}).status_code == 404

    def counted():
        """Whether the last batch is counted, whose duration comes last, after its answers."""
        found = scrape(service)
        ran = found.value("embedding_batch_texts_sum") - before.value("te_batch_next_size_sum")
        counts = [found.value(f"embedding_batch_{name}_count") for name in ("texts", "duration_seconds")]
        return ran == 25 and counts[0] == counts[1]

    wait_until(counted, "the count of every batch")
    after = scrape_as_tei(service)

    def gained(name: str, **labels: str) -> float:
        # The parser gives counters the ending that they have in OpenMetrics.
        name = f"{name}_total" if tei_metrics.TYPES.get(name) == "counter" else name
        return after.value(name, **labels) - before.value(name, **labels)

    assert gained("te_request_count") == 15 + 1 + 3
    assert gained("te_request_success") == 15 + 1
    assert gained("te_request_failure") == gained("te_request_failure", err="validation") == 3
    assert gained("te_request_duration_count") == 15 + 1 + 3
    for phase in ("tokenization", "queue", "inference"):
        assert gained(f"te_request_{phase}_duration_count") == 15
        assert gained(f"te_request_{phase}_duration_bucket", le="+Inf") == 15
    assert gained("te_request_inference_duration_sum") > 0
    assert gained("te_embed_count") == gained("te_embed_success") == 25
    assert gained("te_batch_next_tokens_sum") == tokens
    assert gained("te_batch_next_size_count") == gained("te_batch_next_tokens_bucket", le="+Inf")
    assert after.samples("te_queue_size")
    own = scrape(service)
    assert after.value("te_batch_next_tokens_sum") == own.value("embedding_batch_tokens_sum")
    for le in ("1.0", "8.0", "+Inf"):
        theirs = after.value("te_batch_next_size_bucket", le=le)
        assert theirs == own.value("embedding_batch_texts_bucket", le=le)


def test_teis_names_are_types_of_its_own_and_the_documentation_lists_them(start_without_model):
    found = scrape_as_tei(start_without_model().wait_ready()).families
    assert {name: family.type for name, family in found.items()} == tei_metrics.TYPES
    assert found.keys() <= OF_TEI
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in written for name in OF_TEI)


def test_other_names_are_refused(two_workers):
    answer = requests.get(f"{two_workers.url}/metrics?names=other", timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"] == "names is 'other'; it must be tei, or left out"
