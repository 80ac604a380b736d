"""Traces: one from the caller's span over gateway and replica to every chunk; nothing in them tells what was asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from diagonal.errors import FieldError
from serve.settings import ServeSettings
from serve.tracing import ENDPOINT, OpenTelemetryTraces, Traces, traces_of
from tests.serve.harness import FakeEngine, Service, Until, http_client
from tests.serve.hostile import new_key
from tests.serve.sockets import viewer

PROMPT = "a red circle that nobody may read of"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What gateways and replicas that are made now tell."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for part in ("gateway", "replica"):
        monkeypatch.setattr(f"serve.{part}.{part}.traces_of", lambda settings, part: OpenTelemetryTraces(provider))
    yield exporter
    provider.shutdown()


@pytest.fixture
def traced(spans: InMemorySpanExporter, make_service: Callable[..., Service]) -> Service:
    return make_service(auth="keys")


def below(spans: tuple[ReadableSpan, ...], parent: ReadableSpan) -> Counter[str]:
    """Names of a span's children."""
    assert parent.context is not None
    return Counter(one.name for one in spans if one.parent and one.parent.span_id == parent.context.span_id)


def named(spans: tuple[ReadableSpan, ...], name: str) -> list[ReadableSpan]:
    return [one for one in spans if one.name == name]


@pytest.mark.parametrize("kind", ["http", "socket"])
def test_a_request_its_admission_and_its_chunks_are_one_trace_below_the_callers_span(
    traced: Service, spans: InMemorySpanExporter, kind: str, until: Until
) -> None:
    headers = new_key(traced) | {"traceparent": CALLER}
    if kind == "http":
        with http_client(traced.urls[0], headers) as http:
            video = http.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 33}).raise_for_status().json()["id"]
            assert http.get(f"/v1/videos/{video}/stream").status_code == 200
    else:
        with viewer(traced.urls[0], headers) as one:
            one.start(prompt=PROMPT, num_frames=33)
            one.until("session.done")
            video = one.request_id
    until(lambda: len(named(spans.get_finished_spans(), "chunk")) == 3, "three chunks")
    found = spans.get_finished_spans()
    (request,), (first,) = named(found, "create_video"), named(found, "first_chunk")
    assert request.parent is not None and f"{request.parent.span_id:016x}" == CALLER.split("-")[2]
    assert {f"{one.context.trace_id:032x}" for one in found if one.context} == {CALLER.split("-")[1]}
    assert below(found, request) == {"admission": 1, "first_chunk": 1, "chunk": 3}
    chunks = named(found, "chunk")
    assert [below(found, chunk) for chunk in chunks] == [{"generation": 1, "encode": 1}] * 3
    assert [chunk.attributes["frames"] for chunk in chunks if chunk.attributes] == [9, 12, 12]
    assert request.start_time and first.end_time and first.end_time > request.start_time
    told = " ".join(f"{one.name} {dict(one.attributes or {})} {one.events}" for one in found)
    key = headers["Authorization"].removeprefix("Bearer ")
    assert not [secret for secret in (PROMPT, key, video) if secret in told]


def test_a_request_that_is_refused_says_why_by_its_kind_alone(
    traced: Service, spans: InMemorySpanExporter, engine: FakeEngine
) -> None:
    engine.allow(0)
    with http_client(traced.urls[0], new_key(traced)) as http:
        for status in (200, 200, 429):
            assert http.post("/v1/videos", json={"prompt": PROMPT}).status_code == status
    refused = [one for one in spans.get_finished_spans() if one.attributes and "error.type" in one.attributes]
    assert [(one.name, (one.attributes or {})["error.type"]) for one in refused] == [
        ("admission", "Problem"),
        ("create_video", "Problem"),
    ]
    assert not any(one.events or one.status.description for one in refused)


def test_a_caller_who_names_no_span_or_a_wrong_one_begins_a_trace(spans: InMemorySpanExporter) -> None:
    provider = TracerProvider()
    for given in ("", "nonsense"):
        with OpenTelemetryTraces(provider).span("create_video", given) as span:
            assert len(span) == len(CALLER) and span.split("-")[1] != CALLER.split("-")[1]


def test_nobody_traces_who_was_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    traces = traces_of(ServeSettings(), "gateway")
    assert type(traces) is Traces
    with traces.span("create_video") as span:
        assert span == traces.past("chunk", "", 0.0, 1.0) == ""


@pytest.mark.parametrize("by_variable", [True, False])
def test_who_asks_for_traces_without_the_package_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318" if by_variable else "")
    settings = ServeSettings(traces="" if by_variable else "http://127.0.0.1:4318")
    with pytest.raises(FieldError, match=r"the extra `traces`"):
        traces_of(settings, "gateway")


@pytest.mark.slow
def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(FieldError, match="traces"):
        ServeSettings(traces="127.0.0.1:4318")
