"""Every metric is told by the event that it is about: in a service, an engine, a training run, a data stage."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from diagonal.data.pair_set import Shard, begin, finish
from diagonal.data.stages import EncodeText, SolveShard
from diagonal.metrics import ALL, BY_NAME, exporter
from jobs import distill, pairs
from jobs.runs.arguments import run_options
from jobs.runs.prompts import pair_prompts_folder
from jobs.runs.run import Run, open_run
from jobs.workers.data_feed import Feed
from jobs.workers.reporting import RankInfo
from jobs.workers.watchdog import Watchdog
from jobs.workers.worker import Worker
from serve.settings import DENY_LIST, ServeSettings
from tests.data.rows import spoil
from tests.engine.driving import Clock, admitted, engine_of, pull, spec_of, stream, timed
from tests.jobs.conftest import SMALL
from tests.jobs.workers.reports import FIGURES, hooks, reporter
from tests.networks import small_release
from tests.recorded_metrics import RecordedMetrics
from tests.serve.harness import Cluster, FakeEngine, Service, deadline
from tests.serve.hostile import new_key
from tests.serve.sockets import cut, viewer

pytestmark = pytest.mark.slow
PROMPT, OTHER, FORBIDDEN = "a red circle moves left", "a blue square moves right", "a heron"
FRAMES, CHUNKS = 117, 10
DEADLINE_S = 60.0


class Seen(RecordedMetrics):
    """What was told, and the ids and keys that none of it may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets = {PROMPT, OTHER, FORBIDDEN}
        self.frames = 0


def wait_until(condition: Any, what: str) -> None:
    with deadline(DEADLINE_S, what) as tick:
        while not condition():
            tick()


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A stream that is steered, resumed through another gateway, and goes on when its replica is killed."""
    seen = Seen()
    cluster = Cluster(ServeSettings(data=str(tmp_path_factory.mktemp("moved")), gateways=2, replicas=2), FakeEngine())
    cluster.metrics = seen
    cluster.start()
    try:
        with viewer(cluster.urls[0], deadline_s=DEADLINE_S) as one:
            one.start(prompt=PROMPT, num_frames=FRAMES, seed=3)
            one.read(2)
            one.say("session.interaction", interaction={"event_id": "e-secret", "event": {"prompt": OTHER}})
            one.until("session.interaction.queued")
            cut(one)
        with viewer(cluster.urls[1], deadline_s=DEADLINE_S) as two:
            two.start(resume_token=one.resume_token)
            two.read(3)
            cluster.kill_holder(one.request_id)
            two.until("session.done")
        wait_until(lambda: seen.of("diagonal_sessions_total"), "its end is counted")
        seen.secrets |= {one.request_id, one.resume_token, two.resume_token, "e-secret"}
        seen.frames = sum(chunk["num_frames"] for chunk in one.chunks + two.chunks)
        assert [*one.indices, *two.indices] == list(range(CHUNKS))
    finally:
        cluster.stop()
    yield seen


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A service with keys whose engine stalls, that has no room, and that refuses a prompt and a route."""
    seen, folder = Seen(), tmp_path_factory.mktemp("refused")
    (folder / "deny.txt").write_text("heron")
    policy = f"{DENY_LIST}{folder / 'deny.txt'}"
    service = Service(ServeSettings(data=str(folder), auth="keys", prompt_policy=policy), FakeEngine())
    service.metrics = seen
    service.start()
    headers = new_key(service)
    try:
        with httpx2.Client(base_url=service.urls[0], headers=headers, timeout=DEADLINE_S) as http:
            assert http.post("/v1/videos", json={"prompt": FORBIDDEN}).status_code == 422
            assert http.get("/v1/nothing").status_code == 404
            service.engine.allow(2)
            with viewer(service.urls[0], headers, DEADLINE_S) as one:
                one.start(prompt=PROMPT, num_frames=57)
                one.read(2)
                time.sleep(2.0)  # more than the media of two chunks
                service.engine.allow(float("inf"))
                one.until("session.done")
            service.engine.allow(0)
            for status in (200, 200, 429):
                assert http.post("/v1/videos", json={"prompt": PROMPT}).status_code == status
        seen.secrets |= {one.request_id, headers["Authorization"].removeprefix("Bearer ")}
    finally:
        service.stop()
    yield seen


@pytest.fixture(scope="module")
def alone() -> Seen:
    """An engine in an overload, and one without memory for a session."""
    seen = Seen()
    clock = Clock()
    release = timed(small_release("serve.degraded_steps=2", "serve.budget_share=0.95"), clock, 0.0, 0.08)
    engine = engine_of(release=release, clock=clock, metrics=seen)
    engine.warm_up()
    assert admitted(engine, "ab") == "ab"
    full = engine_of("serve.max_sessions=1", metrics=seen)
    full.open(spec_of("a"))
    while full.maker.pool.free_pages:
        full.maker.pool.take()
    assert pull(full, "a").code == "out_of_memory"
    return seen


def small_run(folder: Path, *settings: str) -> Run:
    chosen = [f"train.storage={folder}", *SMALL, "distill.stage1_updates=1", "distill.stage2_updates=1", *settings]
    return open_run(run_options(["--preset=tiny", "--name=run", *(f"--set={one}" for one in chosen)], ""))


def plain_batches(self: Feed, done: int, rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """As Ray Data gives them, without it."""
    table = self.own_rows(done, rank, ranks)
    return (table.slice(start, self.batch_size).to_pydict() for start in range(0, len(table), self.batch_size))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two updates, then another start that meets a broken checkpoint; a skipped update and a skipped checkpoint."""
    seen, run = Seen(), small_run(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "batches", plain_batches)
        patch.setattr(Worker, "_metrics", lambda self: seen)
        for start in range(2):
            if start:
                checkpoints = run.folder / "train/distill/checkpoints"
                newest = max(name for name in checkpoints.children() if name.startswith("update"))
                file = next(name for name in (checkpoints / newest).files() if name.endswith(".distcp"))
                spoil(checkpoints / newest, file, -1)
            place = RankInfo("distill", 0, 1)
            with Worker(run, place, torch.device("cpu"), Watchdog(300, "here"), on_ray=False) as worker:
                distill.train(worker, distill.distill_feed(run))
    telling = hooks()
    telling.reporter = reporter(tmp_path_factory.mktemp("skipped"), seen)
    telling.reporter.started(0, None)
    telling.report(1, FIGURES | {"skipped": 1.0})

    def skip(state: Any, wait: bool) -> None:
        telling._checkpointer.skipped += 1

    telling._checkpointer.save = skip  # type: ignore[method-assign, assignment]
    assert telling.state is not None
    telling.save(telling.state)
    telling.reporter.close()
    return seen


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The pairs stage, shard by shard, and a set of which a row went bad before it was trained on."""
    seen, run = Seen(), small_run(tmp_path_factory.mktemp("paired"), "pairs.count=4", "pairs.max_bad_share=0.5")
    plan, folder = pairs.plan_of(run), run.folder / "pairs"
    begin(folder, plan)
    encode, solve = EncodeText(plan, pair_prompts_folder(run)), SolveShard(plan, folder)
    progress, shards = pairs._Progress(seen, len(plan.shards), 4), []
    for number in plan.shards:
        made = solve(encode({"shard": np.array([number])}))
        row = {name: column[0].item() for name, column in made.items()}
        shards.append(Shard(number, row["rows"], row["bytes"], row["checksum"]))
        progress(shards[-1], row["encode_s"], row["solve_s"])
    finish(folder, plan, shards)
    spoil(folder, shards[0].file, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "ray_metrics", lambda: seen)
        patch.setattr(pairs, "connect", lambda: None)
        pairs.usable_pairs(run)
    return seen


SEEN_ELSEWHERE = {
    "diagonal_engine_late_seconds_total"
}  # tests/serve/gateway/test_slow_replicas.py: it takes a late engine
RUNS = ("moved", "refused", "alone", "trained", "paired")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> list[Seen]:
    return [request.getfixturevalue(name) for name in RUNS]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - SEEN_ELSEWHERE))
def test_a_metric_is_moved_by_what_it_tells_of(name: str, runs: list[Seen]) -> None:
    assert any(run.of(name) for run in runs)


def test_nothing_is_told_that_is_not_declared(runs: list[Seen]) -> None:
    assert [str(error) for run in runs for error in run.wrong] == []


def test_no_label_holds_a_session_a_prompt_or_a_key(runs: list[Seen]) -> None:
    values = {value for run in runs for record in run.records for value in record.labels.values()}
    secrets = {secret for run in runs for secret in run.secrets}
    assert len(secrets) > 8 and not [value for value in values for secret in secrets if secret in value]
    assert all(value.replace("_", "").isalnum() and len(value) < 32 for value in values)


def test_buckets_reach_as_far_as_what_is_seen(runs: list[Seen]) -> None:
    for spec in ALL:
        values = [value for run in runs for value in run.values(spec.name)]
        assert not spec.buckets or max(values) <= spec.buckets[-1], spec.name


def test_a_stream_that_is_resumed_and_moved_counts_once(moved: Seen) -> None:
    assert moved.total("diagonal_frames_sent_total") == moved.frames == FRAMES
    assert len(moved.of("diagonal_time_to_first_frame_seconds")) == 1
    assert [one.labels for one in moved.of("diagonal_sessions_total")] == [{"outcome": "completed"}]
    (migration,) = moved.of("diagonal_session_migrations_total")
    assert migration.labels["outcome"] == "moved" and migration.labels["cause"] in ("session_lost", "replica_gone")
    assert len(moved.of("diagonal_prompt_update_latency_seconds")) == 1


def test_a_refusal_is_counted_once_where_the_caller_is_told(refused: Seen) -> None:
    assert [one.labels for one in refused.of("diagonal_rejected_total")] == [{"reason": "full"}]
    assert [one.labels for one in refused.of("diagonal_prompts_refused_total")] == [{"reason": "policy"}]


def test_the_real_time_factor_is_generated_media_over_busy_time(moved: Seen) -> None:
    assert moved.total("diagonal_generated_media_seconds_total") >= FRAMES / 16
    assert moved.total("diagonal_generation_busy_seconds_total") > 0
    assert moved.total("diagonal_frames_generated_total") == moved.total("diagonal_generated_media_seconds_total") * 16


def test_a_run_tells_of_its_updates_its_restart_and_its_checkpoints(trained: Seen) -> None:
    updates = [(one.labels["network"], one.value) for one in trained.of("diagonal_updates_total")]
    assert updates[:4] == [("generator", 1.0), ("critic", 1.0)] * 2, "of two updates"
    assert trained.total("diagonal_restarts_total") == 1 == trained.total("diagonal_checkpoints_refused_total")
    assert [one.value for one in trained.of("diagonal_training_stage")][:2] == [1, 2]
    assert trained.total("diagonal_nonfinite_updates_total") == 1 == trained.total("diagonal_checkpoints_skipped_total")
    assert len(trained.of("diagonal_checkpoint_save_seconds")) >= 2
    assert all(0 < one.value < 1 for one in trained.of("diagonal_model_flops_utilisation_ratio"))
    assert {one.labels["loss"] for one in trained.of("diagonal_loss")} >= {"dmd", "critic"}


def test_the_pairs_stage_counts_down_to_none_missing(paired: Seen) -> None:
    assert [one.value for one in paired.of("diagonal_pairs_missing")] == [4, 2, 0]
    assert paired.total("diagonal_pairs_total") == 4
    assert {one.labels["step"] for one in paired.of("diagonal_pairs_shard_seconds")} == {"encode", "solve"}
    quarantined = [(one.labels, one.value) for one in paired.of("diagonal_data_quarantined_total")]
    assert quarantined == [({"stage": "ode_init", "reason": "unreadable"}, 2.0)]


def test_an_engine_without_ray_shows_its_numbers_to_prometheus() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with exporter(port) as metrics:
        stream(engine_of(metrics=metrics), spec_of(), 2)
        text = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["diagonal_frames_generated_total"]) == 9 + 12
    assert float(lines["diagonal_chunk_generation_seconds_count"]) == 2
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=5)
