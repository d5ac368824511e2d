"""Sends a span for each request over OTLP, if OpenTelemetry's variables name a collector."""

import atexit
import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request

from embedding_service import __version__
from embedding_service.observability.outside import SimpleQueue, start_new_thread
from embedding_service.web.context import current

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

log = logging.getLogger(__name__)

# How often the end of an export is looked for, and how long the end of the process waits for the last one.
PAUSE_SECONDS, LAST_SECONDS = 0.05, 0.5


def register(app: Flask) -> None:
    """Attach to the app's responses."""
    # Imported only if traces are sent, since the packages are optional.
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    class OutsideExporter(SpanExporter):
        """Sends in one thread of the operating system, with its own connections, names and TLS."""

        def __init__(self, exporter: SpanExporter) -> None:
            self._exporter = exporter
            self._batches: SimpleQueue[tuple[Sequence[ReadableSpan], list[SpanExportResult]]] = SimpleQueue()
            self._thread = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if not self._thread:
                self._thread = start_new_thread(self._send_forever, ())
            results: list[SpanExportResult] = []
            self._batches.put((spans, results))
            while not results:
                time.sleep(PAUSE_SECONDS)  # other greenlets run meanwhile
            return results[0]

        def _send_forever(self) -> None:
            while True:
                spans, results = self._batches.get()
                try:
                    results.append(self._exporter.export(spans))
                except Exception as error:
                    log.warning("Spans could not be sent: %s", error)
                    results.append(SpanExportResult.FAILURE)

    class RequestTraceIds(RandomIdGenerator):
        """A span without a parent gets the trace id that is on the request's log lines."""

        def generate_trace_id(self) -> int:
            return int(current().new_trace_id, 16)

    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        # OTEL_SERVICE_NAME is not set.
        resource = resource.merge(Resource({SERVICE_NAME: "embedding-service"}))
    provider = TracerProvider(resource=resource, id_generator=RequestTraceIds(), shutdown_on_exit=False)
    processor = BatchSpanProcessor(OutsideExporter(OTLPSpanExporter()))
    provider.add_span_processor(processor)
    atexit.register(_send_last, processor)
    tracer = provider.get_tracer("embedding_service")
    propagator = TraceContextTextMapPropagator()

    def end(response: Response) -> Response:
        now = time.time_ns()
        route = request.url_rule.rule if request.url_rule is not None else ""
        span = tracer.start_span(
            f"{request.method} {route}".strip(),
            context=propagator.extract({"traceparent": request.headers.get("traceparent", "")}),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(route, response),
            start_time=now - round(current().seconds * 1e9),
        )
        if response.status_code >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end(now)
        propagator.inject(response.headers, trace.set_span_in_context(span))
        return response

    app.after_request(end)


def _send_last(processor: "BatchSpanProcessor") -> None:
    """Send what is waiting, but let no collector delay the end of the process."""
    sending = threading.Thread(target=processor.force_flush, daemon=True)
    sending.start()
    sending.join(LAST_SECONDS)


def _attributes(route: str, response: Response) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": request.method,
        "http.route": route,
        "http.response.status_code": response.status_code,
        "url.path": request.path,
        "embedding.request_id": current().id,
    }
    counts = {"embedding.texts": current().texts, "embedding.tokens": current().tokens}
    found |= {name: count for name, count in counts.items() if count is not None}
    result = current().result
    if result is not None:
        timings, info = result.timings, current().service.engine.status().info
        # https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
        found |= {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": "embedding_service",
            "gen_ai.request.model": info.model_name if info else "",
            "gen_ai.usage.input_tokens": result.tokens,
            "gen_ai.embeddings.dimension.count": result.vectors.shape[1],
        }
        found |= {
            "embedding.tokenization_ms": timings.tokenization_ms,
            "embedding.queue_ms": timings.queue_ms,
            "embedding.inference_ms": timings.inference_ms,
        }
    return found
