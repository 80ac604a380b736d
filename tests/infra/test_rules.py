"""Recording and alert rules: they parse, each alert fires when it should and only then, and says what to do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from diagonal.metrics import ALL
from infra.prometheus.expressions import RULES, every_expression, rule_expressions, rules
from tests.conftest import need_program
from tests.infra import promtool
from tests.infra.promtool import Case

FOLDER = RULES.parent
ALERTS = [rule for rule in rules() if "alert" in rule]
FIRST, STALL = "ray_diagonal_time_to_first_frame_seconds", "ray_diagonal_stream_stall_seconds_total"
MEDIA, REFUSED = "ray_diagonal_stream_media_seconds_total", "ray_diagonal_rejected_total"
APP = 'application="a"'
REPLICA = f'{APP},deployment="d",replica="r"'
STEPS = 'stage="distill"'


def first_frames(late: float) -> dict[str, str]:
    """A hundred streams a minute, of which `late` begin too late."""
    return {f"{FIRST}_count{{{APP}}}": "0+100x600", f'{FIRST}_bucket{{{APP},le="2.0"}}': f"0+{100 - late:g}x600"}


def rare(name: str, labels: str, before: int, after: int) -> dict[str, str]:
    """A counter that a worker began before, and that counts `after` more at minute 20."""
    return {f"{name}{{{labels}}}": f"{before}x19 {before + after}x60"}


def born(name: str, labels: str) -> dict[str, str]:
    """A counter whose first event is all that there is of it, at minute 20."""
    return {f"{name}{{{labels}}}": "_x20 1x60"}


def drifting(ratio: str) -> dict[str, str]:
    """All chunks have a saturation just under `ratio`, a bound of the histogram."""
    name = "ray_diagonal_stream_drift_ratio_bucket"
    bounds = ("0.7", "0.8", "0.95", "1.05", "1.25", "1.5", "2.0", "+Inf")
    steps = {bound: 60 if bounds.index(bound) >= bounds.index(ratio) else 0 for bound in bounds}
    return {f'{name}{{{REPLICA},measure="saturation",le="{bound}"}}': f"0+{step}x120" for bound, step in steps.items()}


CASES = [
    Case("FirstFrameLate", 10, first_frames(20), first_frames(5)),
    Case("FirstFrameLate", 180, first_frames(8), first_frames(5)),
    Case("FirstFrameOftenLate", 90, first_frames(2), first_frames(0.5)),
    Case(
        "PlaybackStalls",
        10,
        {f"{STALL}{{{APP}}}": "0+20x60"},
        {f"{STALL}{{{APP}}}": "0+5x60"},
        {f"{MEDIA}{{{APP}}}": "0+100x60"},
    ),
    Case(
        "PlaybackStalls",
        180,
        {f"{STALL}{{{APP}}}": "0+8x300"},
        {f"{STALL}{{{APP}}}": "0+5x300"},
        {f"{MEDIA}{{{APP}}}": "0+100x300"},
    ),
    Case("PlaybackOftenStalls", 90, {f"{STALL}{{{APP}}}": "0+2x300"}, {}, {f"{MEDIA}{{{APP}}}": "0+100x300"}),
    Case(
        "SlowerThanPlayback",
        10,
        {f"ray_diagonal_generated_media_seconds_total{{{REPLICA}}}": "0+50x30"},
        {f"ray_diagonal_generated_media_seconds_total{{{REPLICA}}}": "0+61x30"},
        {f"ray_diagonal_generation_busy_seconds_total{{{REPLICA}}}": "0+60x30"},
    ),
    Case(
        "SessionsFail",
        20,
        {f'ray_diagonal_session_failures_total{{{APP},code="x"}}': "0+2x60"},
        {f'ray_diagonal_session_failures_total{{{APP},code="x"}}': "1x60"},
        {f'ray_diagonal_sessions_total{{{APP},outcome="completed"}}': "0+100x60"},
    ),
    Case(
        "ServerErrors",
        20,
        {f'ray_serve_num_http_error_requests_total{{{APP},error_code="500"}}': "0+3x60"},
        {
            f'ray_serve_num_http_error_requests_total{{{APP},error_code="{code}"}}': "0+50x60"
            for code in ("1000", "1001", "1012", "1013", "4001", "404", "429")
        },
        {f"ray_serve_num_http_requests_total{{{APP}}}": "0+100x60"},
    ),
    Case(
        "PromptPolicyFails",
        24,
        born("ray_diagonal_prompts_refused_total", f'{APP},reason="failed"'),
        born("ray_diagonal_prompts_refused_total", f'{APP},reason="policy"'),
    ),
    Case("StreamsDrift", 60, drifting("1.5"), drifting("1.05")),
    Case("StreamsDrift", 60, drifting("0.7"), drifting("0.95")),
    Case(
        "ViewersTurnedAway",
        30,
        {f'{REFUSED}{{{APP},reason="full"}}': "0+10x60"},
        {f'{REFUSED}{{{APP},reason="full"}}': "0+2x60", f'{REFUSED}{{{APP},reason="quota"}}': "0+90x60"},
        {f"{FIRST}_count{{{APP}}}": "0+100x60"},
    ),
    Case(
        "CacheNearlyFull",
        20,
        {f"ray_diagonal_kv_cache_bytes{{{REPLICA}}}": "95x60"},
        {f"ray_diagonal_kv_cache_bytes{{{REPLICA}}}": "85x60"},
        {f"ray_diagonal_kv_cache_capacity_bytes{{{REPLICA}}}": "100x60"},
    ),
    Case(
        "NoReplica",
        25,
        {f"ray_serve_deployment_replica_healthy{{{REPLICA}}}": "1x20 0x60"},
        {f"ray_serve_deployment_replica_healthy{{{REPLICA}}}": "1x60"},
        {f'ray_serve_deployment_replica_healthy{{{APP},deployment="d",replica="s"}}': "0x60"},
    ),
    Case(
        "ReplicasMissing",
        20,
        {f"ray_serve_deployment_replica_healthy{{{REPLICA}}}": "1x60"},
        {f"ray_serve_deployment_replica_healthy{{{REPLICA}}}": "2x60"},
        {f'ray_serve_autoscaling_target_replicas{{{APP},deployment="d"}}': "2x60"},
    ),
    Case(
        "ReplicasRestart",
        25,
        rare("ray_serve_deployment_replica_starts_total", f'{APP},deployment="d"', 2, 7),
        rare("ray_serve_deployment_replica_starts_total", f'{APP},deployment="d"', 2, 2),
        {f"ray_serve_deployment_replica_healthy{{{REPLICA}}}": "2x60"},
    ),
    Case(
        "SessionsLost",
        25,
        born("ray_diagonal_session_migrations_total", f'{APP},cause="lost",outcome="failed"'),
        born("ray_diagonal_session_migrations_total", f'{APP},cause="lost",outcome="moved"'),
    ),
    Case(
        "DiskNearlyFull",
        20,
        {'ray_node_disk_utilization_percentage{ip="x"}': "92x60"},
        {'ray_node_disk_utilization_percentage{ip="x"}': "88x60"},
    ),
    Case(
        "MemoryNearlyFull",
        20,
        {'ray_node_mem_used{ip="x"}': "97x60"},
        {'ray_node_mem_used{ip="x"}': "93x60"},
        {'ray_node_mem_total{ip="x"}': "100x60"},
    ),
    Case(
        "NoCheckpoint",
        30,
        {f"ray_diagonal_checkpoint_age_seconds{{{STEPS}}}": "0+60x60"},
        {f"ray_diagonal_checkpoint_age_seconds{{{STEPS}}}": "0+60x9 0+60x9 0+60x9 0+60x9"},
        {f"ray_diagonal_checkpoint_interval_seconds{{{STEPS}}}": "600x60"},
    ),
    Case(
        "TrainingStandsStill",
        50,
        {f"ray_diagonal_training_update{{{STEPS}}}": "0+1x10 10x60"},
        {f"ray_diagonal_training_update{{{STEPS}}}": "0+1x90"},
        {f"ray_diagonal_training_updates_planned{{{STEPS}}}": "100x60"},
    ),
    Case(
        "TrainingStandsStill",
        50,
        {f"ray_diagonal_training_update{{{STEPS}}}": "99x60"},
        {f"ray_diagonal_training_update{{{STEPS}}}": "100x60"},
        {f"ray_diagonal_training_updates_planned{{{STEPS}}}": "100x60"},
    ),
    Case(
        "UpdatesNotFinite",
        25,
        born("ray_diagonal_nonfinite_updates_total", STEPS),
        rare("ray_diagonal_nonfinite_updates_total", STEPS, 3, 0),
    ),
    Case(
        "UpdatesNotFinite",
        25,
        rare("ray_diagonal_nonfinite_updates_total", STEPS, 3, 1),
        {f"ray_diagonal_nonfinite_updates_total{{{STEPS}}}": "3x5 4x60"},
    ),
    Case(
        "WorkersRestart",
        70,
        rare("ray_diagonal_restarts_total", STEPS, 1, 2),
        rare("ray_diagonal_restarts_total", STEPS, 3, 1),
    ),
    Case("CheckpointsRefused", 25, born("ray_diagonal_checkpoints_refused_total", STEPS), {}),
    Case("CheckpointsTooSlow", 25, born("ray_diagonal_checkpoints_skipped_total", STEPS), {}),
    Case(
        "ReplicaLate",
        20,
        {f"ray_diagonal_engine_late_seconds_total{{{REPLICA}}}": "0+12x60"},
        {f"ray_diagonal_engine_late_seconds_total{{{REPLICA}}}": "0+3x60"},
    ),
    Case(
        "DataStarves",
        40,
        {f"ray_diagonal_data_wait_seconds_total{{{STEPS}}}": "0+24x60"},
        {f"ray_diagonal_data_wait_seconds_total{{{STEPS}}}": "0+12x60"},
    ),
    Case(
        "SamplesQuarantined",
        10,
        {'ray_diagonal_data_quarantined_total{stage="pairs",reason="x"}': "2x60"},
        {'ray_diagonal_data_quarantined_total{stage="pairs",reason="x"}': "1x60"},
        {"ray_diagonal_pairs_total": "120x60"},
    ),
    Case(
        "DataRots",
        25,
        born("ray_diagonal_data_quarantined_total", 'stage="ode_init",reason="checksum"'),
        born("ray_diagonal_data_quarantined_total", 'stage="pairs",reason="x"'),
    ),
    Case(
        "TargetDown",
        25,
        {'up{job="ray",instance="x"}': "1x20 0x60"},
        {'up{job="ray",instance="x"}': "1x60"},
        {'up{job="ray",instance="y"}': "1x60"},
    ),
    Case("TargetsAbsent", 10, {'up{job="other"}': "1x60"}, {'up{job="ray"}': "0x60"}),
]


@pytest.fixture(scope="module")
def program() -> str:
    return need_program("promtool")


def test_rules_and_configuration_are_what_prometheus_reads(program: str) -> None:
    done = promtool.run("check", "rules", *sorted(RULES.glob("*.yml")))
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool.run("check", "config", FOLDER / "prometheus.yml")
    assert done.returncode == 0 and "2 rule files found" in done.stdout, done.stdout + done.stderr


def test_the_configuration_for_kubernetes_differs_in_how_pods_are_found_alone(program: str, tmp_path: Path) -> None:
    """Debian's Prometheus is built without Kubernetes, so what is left of the file is checked."""
    file = yaml.safe_load((FOLDER / "kubernetes.yml").read_text())
    (job,) = file["scrape_configs"]
    (found,) = job.pop("kubernetes_sd_configs")
    assert found == {"role": "pod", "selectors": [{"role": "pod", "label": "ray.io/cluster"}]}
    file["rule_files"] = [str(RULES / "*.yml")]
    (tmp_path / "k.yml").write_text(yaml.safe_dump(file))
    done = promtool.run("check", "config", tmp_path / "k.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_alert_fires_when_it_should_and_not_when_it_should_not(program: str, tmp_path: Path) -> None:
    assert {case.alert for case in CASES} == {rule["alert"] for rule in ALERTS}
    done = promtool.try_rules(tmp_path, sorted(RULES.glob("*.yml")), CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_that_never_fires_and_one_that_always_does_are_found(program: str, tmp_path: Path) -> None:
    for broken, replaced in (('up{job="ray"} == 0', 'up{job="ray"} == 7'), ('up{job="ray"} == 0', "up >= 0")):
        text = (RULES / "alerts.yml").read_text()
        assert broken in text
        copy = tmp_path / "alerts.yml"
        copy.write_text(text.replace(broken, replaced))
        cases = [case for case in CASES if case.alert == "TargetDown"]
        done = promtool.try_rules(tmp_path, [copy, RULES / "recording.yml"], cases)
        assert done.returncode == 1 and "TargetDown" in done.stdout + done.stderr


def test_a_misspelled_rule_is_refused(program: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "p", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "p" / "rules" / "alerts.yml"
    path.write_text(path.read_text().replace("for: 2m", "fro: 2m", 1))
    assert promtool.run("check", "config", tmp_path / "p" / "prometheus.yml").returncode == 1


def test_every_expression_of_panels_and_rules_parses(program: str, tmp_path: Path) -> None:
    def check(texts: list[str]) -> Any:
        recorded = [{"record": f"x:{number}", "expr": text} for number, text in enumerate(texts)]
        (tmp_path / "r.yml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": recorded}]}))
        return promtool.run("check", "rules", tmp_path / "r.yml")

    texts = [text for one in every_expression() for text in (one.text, one.measured)]
    done = check(texts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert check([*texts, "sum(rate(x[5m])"]).returncode == 1


def test_no_rule_names_a_metric_of_ours_that_does_not_exist() -> None:
    ours = {
        f"ray_{spec.name}{end}"
        for spec in ALL
        for end in (("_bucket", "_count", "_sum") if spec.kind == "histogram" else ("",))
    }
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = set().union(*(one.metrics for one in rule_expressions()))
    assert {name for name in named if "diagonal" in name} - ours - recorded == set()
    used = set().union(*(one.metrics for one in every_expression()))
    assert recorded - used == set(), "recorded, and asked for by nobody"


def test_every_alert_says_what_it_means_and_leads_to_its_place_in_the_runbook(repository: Path) -> None:
    headings = re.findall(r"^### (.+)$", (repository / "docs" / "runbook.md").read_text(), flags=re.M)
    anchors = {anchor(heading) for heading in headings}
    for rule in ALERTS:
        told = rule["annotations"]
        assert set(told) == {"summary", "description", "runbook"} and rule["labels"]["severity"] in ("page", "ticket")
        assert len(told["description"]) > 40 and not told["summary"].endswith("."), rule["alert"]
        page, _, place = told["runbook"].partition("#")
        assert page == "docs/runbook.md" and place in anchors, rule["alert"]


def test_every_alert_is_named_in_the_runbook(repository: Path) -> None:
    text = (repository / "docs" / "runbook.md").read_text()
    assert [rule["alert"] for rule in ALERTS if f"`{rule['alert']}`" not in text] == []
    named = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", text))
    assert named - {rule["alert"] for rule in ALERTS} - {"Gateway", "Replica", "Store"} == set()


def anchor(heading: str) -> str:
    """What a page's own link to a heading ends with."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
