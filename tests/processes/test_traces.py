"""Traces over OTLP, from the real service to a collector in this process."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from embedding_service.errors import StartupError
from embedding_service.server import preflight
from embedding_service.settings import environment
from tests.service import wait_until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps the spans that it receives."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self, name: str) -> list:
        found = [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return [span for span in found if span.name == name]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def test_a_request_becomes_a_span_of_the_callers_trace(start_without_model, collector):
    service = start_without_model(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="100"
    ).wait_ready()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "mine"}
    response = service.post("/embed", {"texts": ["one", "two"]}, headers=headers)
    assert response.status_code == 200
    wait_until(lambda: collector.spans("POST /embed"), "the span")
    [span] = collector.spans("POST /embed")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert response.headers["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    attributes = {each.key: each.value for each in span.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["embedding.request_id"].string_value == "mine"
    assert (attributes["embedding.texts"].int_value, attributes["embedding.tokens"].int_value) == (2, 6)
    assert attributes["embedding.inference_ms"].double_value > 0
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    resource = collector.requests[0].resource_spans[0].resource
    names = {each.key: each.value.string_value for each in resource.attributes}
    assert names["service.name"] == "embedding-service"


def test_a_request_without_a_trace_begins_one(start_without_model, collector):
    service = start_without_model(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
        ACCESS_LOG="true",
        LOG_FORMAT="json",
    ).wait_ready()
    response = service.post("/embed", {"texts": "one"}, headers={"X-Request-ID": "mine"})
    wait_until(lambda: collector.spans("POST /embed"), "the span")
    [span] = collector.spans("POST /embed")
    assert span.parent_span_id == b""
    _, trace, parent, _ = response.headers["traceparent"].split("-")
    assert (trace, parent) == (span.trace_id.hex(), span.span_id.hex())
    lines = [json.loads(line) for line in service.log().splitlines() if '"mine"' in line]
    assert [line["trace_id"] for line in lines] == [span.trace_id.hex()]


def test_an_unreachable_collector_delays_nobody(start_without_model):
    service = start_without_model(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9").wait_ready()
    assert service.post("/embed", {"texts": "hello"}).status_code == 200


def test_a_missing_package_stops_the_start(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(StartupError, match=r"pip install opentelemetry-sdk"):
        preflight.check_traces("")


def test_another_protocol_than_ours_stops_the_start(start):
    service = start(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4317", OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert service.process.wait(120) == 78
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc is not supported" in service.log().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, False),
    ],
    ids=["none", "for everything", "for traces", "turned off"],
)
def test_opentelemetrys_variables_turn_traces_on(variables, wanted):
    assert environment.read(variables).sends_traces is wanted
