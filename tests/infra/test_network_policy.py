"""The network policy: Ray's own ports are reached from inside the cluster alone (threat 13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

POLICY = Path(__file__).parents[2] / "infra" / "kuberay" / "network-policy.yaml"
CLUSTER = {"podSelector": {"matchLabels": {"ray.io/cluster": "diagonal"}}}


@pytest.fixture
def rules() -> list[dict[str, Any]]:
    policy = yaml.safe_load(POLICY.read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy["spec"]
    assert spec["podSelector"] == CLUSTER["podSelector"] and spec["policyTypes"] == ["Ingress"]
    return list(spec["ingress"])


def test_only_the_clusters_own_pods_reach_every_port(rules: list[dict[str, Any]]) -> None:
    assert [rule["from"] for rule in rules if "ports" not in rule] == [[CLUSTER]]
    assert all(rule["from"] and all(rule["from"]) for rule in rules)  # an empty one would be everybody


def test_whoever_else_is_let_in_reaches_the_named_ports_alone(rules: list[dict[str, Any]]) -> None:
    reached = {}
    for rule in rules:
        if "ports" in rule:
            (who,) = rule["from"]
            label = (who.get("podSelector") or who["namespaceSelector"])["matchLabels"]
            reached[next(iter(label))] = [port["port"] for port in rule["ports"]]
    assert reached == {
        "app.kubernetes.io/name": [8265, 52365], "diagonal/front": [8000], "diagonal/monitoring": [8080],
    }  # fmt: skip
