"""What is for kube-prometheus-stack says what the plain files say, and its rules are rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra.prometheus import operator
from infra.prometheus.expressions import DASHBOARDS, RULES
from tests.conftest import need_program
from tests.infra import promtool
from tests.infra.manifests import FOLDER, load

FILE = Path(operator.__file__).with_name("operator.yaml")
DOCUMENTS = load(FILE.read_text())


def test_the_file_is_what_the_generator_writes() -> None:
    assert FILE.read_text() == operator.text(), "python -m infra.prometheus.operator infra/prometheus/operator.yaml"


def test_every_rule_is_there_and_promtool_takes_it(tmp_path: Path) -> None:
    need_program("promtool")
    rules = {one["metadata"]["name"]: one["spec"] for one in DOCUMENTS if one["kind"] == "PrometheusRule"}
    plain = {f"diagonal-{file.stem}": yaml.safe_load(file.read_text()) for file in RULES.glob("*.yml")}
    assert rules == plain and len(rules) == 2
    for name, spec in rules.items():
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(spec))
        done = promtool.run("check", "rules", tmp_path / f"{name}.yml")
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_monitor_finds_the_port_and_the_label_of_every_pod() -> None:
    [monitor] = [one for one in DOCUMENTS if one["kind"] == "PodMonitor"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for name in ("raycluster.yaml", "rayservice.yaml"):
        text = (FOLDER / name).read_text()
        assert f"{{name: {endpoint['port']}, containerPort: 8080}}" in text
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}, "KubeRay puts it on every pod"


def test_every_dashboard_is_a_config_map_below_the_size_that_kubernetes_takes() -> None:
    kustomization = yaml.safe_load((DASHBOARDS / "kustomization.yaml").read_text())
    files = [file.partition("=")[2] for one in kustomization["configMapGenerator"] for file in one["files"]]
    assert sorted(files) == sorted(file.name for file in DASHBOARDS.glob("*.json"))
    assert kustomization["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    assert all((DASHBOARDS / file).stat().st_size < 2**20 for file in files)


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_the_charts_operator_looks_for_its_release(kind: str) -> None:
    labels = [one["metadata"]["labels"] for one in DOCUMENTS if one["kind"] == kind]
    assert labels and all(label == {"release": "kube-prometheus-stack"} for label in labels)
