"""Where the jobs' numbers go: Ray's metrics, on the node of whoever tells them."""

from __future__ import annotations

from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge, Histogram

from diagonal.metrics import FactoryBackend, kept_alive


def ray_metrics() -> FactoryBackend:
    """Of this process, which is to be one of Ray's by the time that it tells something."""
    return kept_alive(FactoryBackend(Counter, Gauge, Histogram, failures=(RayError,)))
