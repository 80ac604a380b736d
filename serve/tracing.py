"""Optional traces (OpenTelemetry): a request, its admission, its session's first chunk and every chunk, in one trace.

Gateway and replica are joined by W3C's `traceparent`, which goes along with the calls. Attributes are numbers, codes
and names of releases: no prompt, no key, no id of a session.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diagonal.errors import FieldError
from serve.settings import ServeSettings

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Traces:
    """Where nobody asked for traces: every span is named ''."""

    @contextmanager
    def span(self, name: str, parent: str = "", **attributes: str | float) -> Iterator[str]:
        """A span around what is done inside; gives its `traceparent`. `parent` is another one's, '' is none."""
        yield ""

    def past(self, name: str, parent: str, began_s: float, ended_s: float, **attributes: str | float) -> str:
        """A span that is over, between two times of `time.monotonic`; gives its `traceparent`."""
        return ""


class OpenTelemetryTraces(Traces):
    """Spans of an OpenTelemetry tracer provider. Of an exception the kind alone is told: its text may hold a prompt."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer, self._w3c = provider.get_tracer("diagonal"), TraceContextTextMapPropagator()
        self._failed, self._context_of = Status(StatusCode.ERROR), set_span_in_context

    @contextmanager
    def span(self, name: str, parent: str = "", **attributes: str | float) -> Iterator[str]:
        span = self._tracer.start_span(name, self._context(parent), attributes=attributes)
        try:
            yield self._name(span)
        finally:
            if kind := sys.exc_info()[0]:
                span.set_attribute("error.type", kind.__name__)
                span.set_status(self._failed)
            span.end()

    def past(self, name: str, parent: str, began_s: float, ended_s: float, **attributes: str | float) -> str:
        zero_ns = time.time_ns() - time.monotonic_ns()
        began_ns, ended_ns = (zero_ns + int(at_s * 1e9) for at_s in (began_s, ended_s))
        span = self._tracer.start_span(name, self._context(parent), attributes=attributes, start_time=began_ns)
        span.end(ended_ns)
        return self._name(span)

    def _context(self, parent: str) -> Any:
        return self._w3c.extract({"traceparent": parent})

    def _name(self, span: Any) -> str:
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier, self._context_of(span))
        return carrier.get("traceparent", "")


def traces_of(settings: ServeSettings, part: str) -> Traces:
    """Of this process, a `part` of the service: sent to `settings.traces`, or where OTEL_EXPORTER_OTLP_ENDPOINT says.

    `FieldError` says what to install where that is missing. OpenTelemetry's other variables count as they always do.
    """
    endpoint = settings.traces or os.environ.get(ENDPOINT, "")
    if not endpoint:
        return Traces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise FieldError("traces", endpoint, "'' without OpenTelemetry (the extra `traces`)") from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"diagonal-{part}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    return OpenTelemetryTraces(provider)


class SessionTrace:
    """One session at a replica: what it tells of its chunks, below the span of the request that began it."""

    def __init__(self, traces: Traces, parent: str) -> None:
        self._traces, self._parent, self._opened_s, self._first = traces, parent, time.monotonic(), True

    def chunk(self, chunk: int, frames: int, generation_s: float, began_s: float) -> None:
        """A chunk is there, whose encoding `began_s` right after its generation."""
        if not self._parent:
            return
        now_s, drawn_s = time.monotonic(), began_s - generation_s
        if self._first:
            self._traces.past("first_chunk", self._parent, self._opened_s, now_s, chunk=chunk)
            self._first = False
        whole = self._traces.past("chunk", self._parent, drawn_s, now_s, chunk=chunk, frames=frames)
        self._traces.past("generation", whole, drawn_s, began_s)
        self._traces.past("encode", whole, began_s, now_s)
