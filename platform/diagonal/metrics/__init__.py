"""The project's metrics: their catalogue, and the backends that take the numbers."""

from diagonal.metrics.backends import FactoryBackend, MetricsBackend, NullBackend, exporter, kept_alive
from diagonal.metrics.catalogue import ALL, BY_NAME, MetricSpec

__all__ = ["ALL", "BY_NAME", "FactoryBackend", "MetricSpec", "MetricsBackend", "NullBackend", "exporter", "kept_alive"]
