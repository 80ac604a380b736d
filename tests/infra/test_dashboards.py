"""The dashboards: their code makes the committed JSON; every panel asks, measures what exists and says what to do."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diagonal.errors import FieldError
from diagonal.metrics import ALL
from infra.grafana import build
from infra.grafana.panels import UNITS, Board, Panel, Query, Section, expanded, to_json
from infra.prometheus.expressions import DASHBOARDS, INFRA, Expression, metrics_of, panel_expressions, panels, rules

FOREIGN = {  # Ray's own, each of which the live test sees
    "ray_node_disk_utilization_percentage",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_num_http_error_requests_total",
    "ray_serve_num_http_requests_total",
}


def exposed() -> dict[str, str]:
    """Every series of ours as Prometheus knows it -> the metric that it belongs to."""
    ends = {"histogram": ("_bucket", "_count", "_sum")}
    return {f"ray_{spec.name}{end}": spec.name for spec in ALL for end in ends.get(spec.kind, ("",))}


def unknown(found: list[Expression]) -> set[str]:
    """Metrics that are named and do not exist."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return set().union(*(one.metrics for one in found)) - exposed().keys() - recorded - FOREIGN


def faults(board: dict[str, Any]) -> list[str]:
    """What is wrong with one dashboard."""
    found, seen = [], set()
    for panel in board["panels"]:
        if panel["id"] in seen:
            found.append(f"id {panel['id']} twice")
        seen.add(panel["id"])
        if panel["type"] == "row":
            continue
        title = panel.get("title", "")
        checks = {
            "a question": title.endswith("?"),
            "what to do": len(panel.get("description", "")) > 40,
            "a unit": panel.get("fieldConfig", {}).get("defaults", {}).get("unit") in UNITS,
            "a source": panel.get("datasource") == {"type": "prometheus", "uid": "${datasource}"},
            "queries": bool(panel.get("targets")),
            "a place": panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24,
            "legends": all(target.get("legendFormat") for target in panel.get("targets", ())),
            "letters": len({target["refId"] for target in panel.get("targets", ())}) == len(panel.get("targets", ())),
        }
        found += [f"{title!r} has no {what}" for what, holds in checks.items() if not holds]
    variables = {one["name"] for one in board["templating"]["list"]} | {"__rate_interval"}
    used = set(
        re.findall(
            r"\$(\w+)", " ".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))
        )
    )
    return found + [f"variable {name} is not defined" for name in sorted(used - variables)]


@pytest.fixture(scope="module")
def boards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}


def test_the_code_makes_the_committed_json_again_letter_by_letter() -> None:
    assert build.different() == []
    assert build.files() == build.files()


def test_a_file_that_was_edited_removed_or_added_by_hand_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(DASHBOARDS, folder)
    (folder / "data.json").write_text((folder / "data.json").read_text().replace("30s", "10s"))
    (folder / "viewers.json").unlink()
    (folder / "other.json").write_text("{}")
    assert build.different(folder) == ["data.json", "other.json", "viewers.json"]


def test_every_dashboard_and_panel_has_what_it_needs(boards: dict[str, dict[str, Any]]) -> None:
    assert set(boards) == {"viewers", "capacity", "training", "data"}
    assert {name: faults(board) for name, board in boards.items()} == dict.fromkeys(boards, [])
    assert len({board["uid"] for board in boards.values()}) == len(boards)
    titles = [panel["title"] for _, panel in panels()]
    assert len(set(titles)) == len(titles) and len(titles) < 60, "few, each asking its own question"


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("title", "Sessions", "a question"),
        ("description", "Look.", "what to do"),
        ("targets", [], "queries"),
        ("fieldConfig", {"defaults": {"unit": "secnds"}}, "a unit"),
        ("datasource", None, "a source"),
        ("id", 1, "twice"),
    ],
)
def test_a_broken_panel_is_found(boards: dict[str, dict[str, Any]], key: str, value: Any, fault: str) -> None:
    broken = json.loads(json.dumps(boards["data"]))
    broken["panels"][1][key] = value
    assert any(fault in one for one in faults(broken))


def test_no_panel_names_a_metric_that_does_not_exist() -> None:
    assert unknown(panel_expressions()) == set()
    assert unknown([Expression("x", "rate(ray_diagonal_frames_send_total[5m])", "panel")]) != set()


def test_no_metric_of_ours_is_on_no_panel() -> None:
    """Through a recording rule counts too."""
    sources = {rule["record"]: metrics_of(rule["expr"]) for rule in rules() if "record" in rule}
    named = set().union(*(one.metrics for one in panel_expressions()))
    named |= set().union(*(sources[name] for name in named if name in sources))
    shown = {exposed()[name] for name in named if name in exposed()}
    assert {spec.name for spec in ALL} - shown == set()


def test_a_legend_names_only_labels_that_the_series_keep() -> None:
    for _, panel in panels():
        for target in panel["targets"]:
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            recorded = {name for name in metrics_of(target["expr"]) if ":" in name}
            for name in recorded:
                rule = next(rule for rule in rules() if rule.get("record") == name)
                kept |= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
            assert wanted <= kept, target


def test_the_metrics_of_an_expression_are_found_and_nothing_else() -> None:
    text = (
        'sum by (le, a) (rate(x_bucket{b="not_me or c"}[5m] offset 10m)) / on (d) group_left (e) clamp_min(y:z, 1)'
        " unless 0 * w > 1e3"
    )
    assert metrics_of(text) == {"x_bucket", "y:z", "w"}


def test_what_an_alert_measures_is_its_expression_without_comparisons() -> None:
    alert = Expression("x", 'a / b > 14.4 * 0.01 and absent(c{d="x"}) and e < f', "alert")
    assert alert.measured.split() == 'a / b and (c{d="x"}) and e < f'.split()


def test_a_panel_without_question_unit_or_advice_is_refused() -> None:
    good = Panel("Is it up?", "Ask whether it is up, and start it again when it is not.", "s", (Query("up", "up"),))
    wrong: list[dict[str, Any]] = [{"title": "Up"}, {"unit": "secs"}, {"advice": "Look."}, {"queries": ()}]
    for fields in wrong:
        with pytest.raises(FieldError):
            replace(good, **fields)


def test_a_shorthand_that_a_dashboard_does_not_know_is_refused() -> None:
    assert expanded('x{APP,y="1"} + z{APP}', {"APP": 'a=~"$a"'}) == 'x{a=~"$a",y="1"} + z{a=~"$a"}'
    with pytest.raises(FieldError, match="WRONG"):
        expanded("x{WRONG}", {"APP": ""})
    advice = "Ask whether it is up, and start it again when it is not."
    sections = (Section("s", (Panel("Is it up?", advice, "s", (Query("up{STAGE}", "up"),)),)),)
    with pytest.raises(FieldError, match="STAGE"):
        to_json(Board("x", "X", "?", (), sections, {}))


def test_grafana_finds_the_dashboards_and_its_prometheus_where_compose_puts_them() -> None:
    grafana = INFRA / "grafana"
    (service,) = yaml.safe_load((grafana / "compose.yaml").read_text())["services"].values()
    mounts = {target: grafana / source for source, target, _ in (one.split(":") for one in service["volumes"])}
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/diagonal.yaml").read_text())["providers"]
    assert mounts[provider["options"]["path"]].resolve() == DASHBOARDS.resolve()
    assert mounts["/etc/grafana/provisioning"].resolve() == (grafana / "provisioning").resolve()
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["url"] == "${PROMETHEUS_URL}"
    assert "PROMETHEUS_URL" in service["environment"] and ":latest" not in service["image"]
    assert service["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
