"""For clusters with kube-prometheus-stack: a PodMonitor, and the rules of this folder as PrometheusRules.

python -m infra.prometheus.operator infra/prometheus/operator.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from infra.prometheus.expressions import RULES

NAMESPACE = "diagonal"
RELEASE = {"release": "kube-prometheus-stack"}  # what that chart's operator looks for unless it is told otherwise
HEAD = """\
# For clusters with kube-prometheus-stack: kubectl apply -f infra/prometheus/operator.yaml
# Written by `python -m infra.prometheus.operator` from infra/prometheus/rules; the dashboards are
# `kubectl apply -k infra/grafana/dashboards`. The namespace of Prometheus needs the label diagonal/monitoring=true.
# Where the chart has another release name, put it in place of `release: kube-prometheus-stack`.
"""


def documents() -> list[dict[str, Any]]:
    """The objects, in the order in which they are written."""
    return [_pod_monitor(), *(_rule(file) for file in sorted(RULES.glob("*.yml")))]


def _pod_monitor() -> dict[str, Any]:
    """Every pod of Ray has its node's metrics on the port `metrics`; they ask for no token."""
    labels = {"ray_cluster": "ray.io/cluster", "ray_node_type": "ray.io/node-type"}
    relabelings = [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{name.translate(_UNDERSCORES)}"], "targetLabel": target}
        for target, name in labels.items()
    ]
    spec = {
        "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
        "podMetricsEndpoints": [{"port": "metrics", "interval": "15s", "relabelings": relabelings}],
    }
    return _object("monitoring.coreos.com/v1", "PodMonitor", "diagonal", RELEASE, spec=spec)


_UNDERSCORES = str.maketrans("./-", "___")


def _rule(file: Path) -> dict[str, Any]:
    spec = yaml.safe_load(file.read_text())
    return _object("monitoring.coreos.com/v1", "PrometheusRule", f"diagonal-{file.stem}", RELEASE, spec=spec)


def _object(version: str, kind: str, name: str, labels: dict[str, str], **rest: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}


def text() -> str:
    """The whole file."""
    return HEAD + yaml.safe_dump_all(documents(), sort_keys=False, width=120)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
