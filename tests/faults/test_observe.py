"""A real Prometheus looks at a real service under load and a real distillation: what it is asked, it can answer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from diagonal.metrics import ALL
from infra.local import cluster
from infra.prometheus.expressions import every_expression, rules
from tests.conftest import need_program
from tests.faults.nodes import until
from tests.faults.observed import Scene, observed, play

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """After all that it shows; Ray and Prometheus still run."""
    need_program("prometheus")
    folder = Path(tempfile.mkdtemp(prefix="do-"))
    try:
        with observed(folder) as found:
            play(found)
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_every_expression_of_every_panel_rule_and_alert_has_data(scene: Scene) -> None:
    """Of an alert: what it compares. Nothing is asked of a metric that nothing told."""
    expressions = every_expression()
    assert len(expressions) > 100
    assert [f"{one.place}: {one.measured}" for one in expressions if not scene.has(one.measured)] == []
    assert not scene.has("ray_diagonal_frames_send_total"), "a question that must have no answer"


def test_every_metric_of_ours_was_told_by_the_service_or_the_jobs(scene: Scene) -> None:
    names = set(scene.ask("label/__name__/values"))
    ends = {"histogram": "_bucket"}
    missing = [spec.name for spec in ALL if f"ray_{spec.name}{ends.get(spec.kind, '')}" not in names]
    assert missing == []


def test_prometheus_reads_every_page_and_evaluates_every_rule(scene: Scene) -> None:
    targets = scene.ask("targets")["activeTargets"]
    assert {one["health"] for one in targets} == {"up"} and len(targets) >= 1
    groups = scene.ask("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(rules())
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []


def test_a_normal_end_of_a_websocket_is_no_error_of_the_service(scene: Scene) -> None:
    """Serve counts it as one, with the close code in the place of the status."""
    (alert,) = [rule for rule in rules() if rule.get("alert") == "ServerErrors"]
    assert "1000|1001" in alert["expr"]
    counted = {
        one["error_code"]
        for one in scene.ask("series", **{"match[]": "ray_serve_num_http_error_requests_total", "start": scene.began})
    }
    assert {"422", "429", "503"} <= counted
    kept = alert["expr"].split("[5m]")[0].split("rate(")[1]
    left = {one["error_code"] for one in scene.ask("series", **{"match[]": kept, "start": scene.began})}
    assert "503" in left and left & {"1000", "1001", "1012", "1013", "422", "429"} == set()


def test_idle_replicas_and_waiting_workers_are_still_measured(scene: Scene) -> None:
    """Ray forgets a gauge that nobody has set for twenty seconds; ours are told again."""
    idle = "sum(ray_diagonal_sessions_active) == 0 and count(ray_diagonal_kv_cache_capacity_bytes) > 0"
    until("no viewers", lambda: scene.ask("query", query=idle)["result"], 300, every_s=1)
    question = f"count_over_time(({idle})[40s:1s]) > 35"
    assert until("forty seconds of it", lambda: scene.ask("query", query=question)["result"], 300, every_s=1)


def test_it_all_ends_with_the_run(scene: Scene) -> None:
    """The last one here: `make stop` ends Prometheus too."""
    members = {psutil.Process(one.pid) for one in scene.run.members}
    prometheus = [one for one in members if one.name() == "prometheus"]
    assert len(prometheus) == 1
    cluster.stop(scene.run.root)
    assert not prometheus[0].is_running() or prometheus[0].status() == psutil.STATUS_ZOMBIE
    assert not Path(scene.run.folder).exists()
