"""Where the service's numbers go: Ray's metrics, with the deployment and replica they come from."""

from __future__ import annotations

from ray.exceptions import RayError
from ray.serve import metrics

from diagonal.metrics import FactoryBackend, kept_alive


def serve_metrics() -> FactoryBackend:
    """Of this process; to be called where Serve has said which replica it is."""
    return kept_alive(FactoryBackend(metrics.Counter, metrics.Gauge, metrics.Histogram, failures=(RayError,)))
