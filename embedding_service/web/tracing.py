"""Sends a span for each request over OTLP, if OpenTelemetry's variables name a collector."""

import time
from typing import Any

from flask import Flask, Response, request

from embedding_service import __version__
from embedding_service.web.context import KEY
from embedding_service.web.request import current


def register(app: Flask) -> None:
    """Attach to the app's responses if traces are sent."""
    if not app.extensions[KEY].settings.traces:
        return
    # Imported only if traces are sent, since the packages are optional.
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    class RequestTraceIds(RandomIdGenerator):
        """A span without a parent gets the trace id that is on the request's log lines."""

        def generate_trace_id(self) -> int:
            return int(current().new_trace_id, 16)

    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        # OTEL_SERVICE_NAME is not set.
        resource = resource.merge(Resource({SERVICE_NAME: "embedding-service"}))
    provider = TracerProvider(resource=resource, id_generator=RequestTraceIds())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
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
        timings = result.timings
        found |= {
            "embedding.tokenization_ms": timings.tokenization_ms,
            "embedding.queue_ms": timings.queue_ms,
            "embedding.inference_ms": timings.inference_ms,
        }
    return found
