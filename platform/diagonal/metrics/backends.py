"""Where metrics go: nowhere, to Ray's metric classes, or to a page of prometheus-client."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any, Protocol

from diagonal.errors import FieldError
from diagonal.metrics.catalogue import BY_NAME, MetricSpec, checked

_LOG = logging.getLogger(__name__)
REPEAT_EVERY_S = 5.0  # Ray reports every ten seconds, and an update or an idle replica's silence may last longer


class MetricsBackend(Protocol):
    """Where numbers go. Every label of the metric must be given; an unknown metric or label raises `FieldError`."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None: ...

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class NullBackend:
    """Checks what it is given and keeps nothing."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        checked(name, "counter", labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        checked(name, "gauge", labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        checked(name, "histogram", labels)


class FactoryBackend:
    """Sends numbers to the metric classes passed in, made on first use.

    `counter(name, description, tag_keys)`, `gauge(...)` the same, `histogram(name, description, boundaries, tag_keys)`:
    the shape of `ray.util.metrics` and `ray.serve.metrics`. Their objects take `inc | set | observe(value, tags)`.
    What a back end that is down raises (OSError, RuntimeError, ValueError, and `failures` of its own) is counted in
    `lost`, logged once, and goes no further.
    """

    def __init__(
        self,
        counter: Callable[..., Any],
        gauge: Callable[..., Any],
        histogram: Callable[..., Any],
        failures: tuple[type[Exception], ...] = (),
    ) -> None:
        self._factories = {"counter": counter, "gauge": gauge, "histogram": histogram}
        self._failures: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *failures)
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = Lock()
        self.lost = 0

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        spec = checked(name, "counter", labels)
        if value > 0:  # Ray refuses a counter's increment of 0
            self._send(spec, "inc", value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._send(checked(name, "gauge", labels), "set", value, labels)
        with self._lock:
            self._gauges[name, tuple(labels.items())] = value

    def repeat(self) -> None:
        """Send every gauge's newest value again: Ray forgets one that nobody set for two of its reports."""
        with self._lock:
            newest = list(self._gauges.items())
        for (name, labels), value in newest:
            self._send(BY_NAME[name], "set", value, dict(labels))

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._send(checked(name, "histogram", labels), "observe", value, labels)

    def _send(self, spec: MetricSpec, method: str, value: float, labels: Mapping[str, str]) -> None:
        """A back end that is down costs its numbers, and neither a chunk nor an update."""
        try:
            getattr(self._metric(spec), method)(value, labels)
        except self._failures as error:
            if not self.lost:
                _LOG.warning("metrics are lost from %s on: %s", spec.name, type(error).__name__)
            self.lost += 1

    def _metric(self, spec: MetricSpec) -> Any:
        with self._lock:
            if spec.name not in self._made:
                self._made[spec.name] = self._make(spec)
            return self._made[spec.name]

    def _make(self, spec: MetricSpec) -> Any:
        bounds = [list(spec.buckets)] if spec.buckets else []
        return self._factories[spec.kind](spec.name, spec.description, *bounds, spec.labels)


class _Labelled:
    """One metric of prometheus-client behind the calls that `FactoryBackend` makes."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def _child(self, labels: Mapping[str, str]) -> Any:
        return self._metric.labels(**labels) if labels else self._metric

    def inc(self, value: float, labels: Mapping[str, str]) -> None:
        self._child(labels).inc(value)

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        self._child(labels).set(value)

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        self._child(labels).observe(value)


@contextmanager
def exporter(port: int) -> Iterator[FactoryBackend]:
    """A backend whose numbers prometheus-client shows at 127.0.0.1:`port`/metrics meanwhile: for processes without Ray.

    `FieldError` where prometheus-client is not installed; `OSError` where the port is taken.
    """
    try:
        import prometheus_client as prometheus
    except ImportError as error:
        raise FieldError("metrics", port, "used with prometheus-client (the extra `serve`)") from error
    registry = prometheus.CollectorRegistry()

    def made(kind: Any) -> Callable[..., _Labelled]:
        return lambda name, description, labels: _Labelled(kind(name, description, labels, registry=registry))

    def histogram(name: str, description: str, buckets: list[float], labels: tuple[str, ...]) -> _Labelled:
        return _Labelled(prometheus.Histogram(name, description, labels, registry=registry, buckets=buckets))

    server, thread = prometheus.start_http_server(port, "127.0.0.1", registry)
    try:
        yield FactoryBackend(made(prometheus.Counter), made(prometheus.Gauge), histogram)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def kept_alive(backend: FactoryBackend, every_s: float = REPEAT_EVERY_S) -> FactoryBackend:
    """The same backend; a thread repeats its gauges for as long as anything refers to it."""
    Thread(target=_repeat, args=(weakref.ref(backend), every_s), name="gauges", daemon=True).start()
    return backend


def _repeat(of: weakref.ref[FactoryBackend], every_s: float) -> None:
    while (backend := of()) is not None:
        backend.repeat()
        del backend
        time.sleep(every_s)
