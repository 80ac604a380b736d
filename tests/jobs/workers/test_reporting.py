"""What surrounds an update: means over ranks, decisions of rank 0, metrics, curves, stops, watchdog, first causes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from diagonal.config import Config
from diagonal.storage import Folder
from diagonal.training.checkpoint import CheckpointError, Restored
from diagonal.training.distributed import GroupLostError
from diagonal.training.state import TrainState
from jobs.ray_cluster import passing_on
from jobs.runs.console import duration
from jobs.runs.update_log import UPDATES, read_journal
from jobs.workers import reporting
from jobs.workers.ray_train import first_cause
from jobs.workers.reporting import RankConsensus, RankInfo
from jobs.workers.samples import curves, sample_captions, save_curves
from jobs.workers.stage_metrics import OWN
from jobs.workers.watchdog import STALLED
from tests.jobs.workers.reports import FIGURES, hooks, reporter
from tests.recorded_metrics import RecordedMetrics


def agree(rank: int, meeting: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mean = RankConsensus(RankInfo("s", rank, 2), weight=(0.75, 0.25)[rank])
    found = mean({"critic": (1.0, 5.0)[rank], "generator_gradient_norm": 3.0, "update_s": float(rank)}, 5 * (rank == 0))
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_losses_are_means_over_the_global_batch_and_rank_0_decides_for_all(tmp_path: Path) -> None:
    processes.spawn(agree, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    (first, decided), (second, also) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first["critic"] == second["critic"] == 0.75 * 1.0 + 0.25 * 5.0
    assert (first["generator_gradient_norm"], first["update_s"], second["update_s"]) == (3.0, 0.0, 1.0)
    assert decided == also == 5


def test_every_update_is_counted_and_every_refused_checkpoint_said_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = RecordedMetrics()
    for start in range(2):
        made = reporter(tmp_path, metrics)
        refused = (CheckpointError(Folder(str(tmp_path)) / "update-9", "altered"),) if start else ()
        made.started(2 * start, Restored(Folder(str(tmp_path)), 2 * start, refused) if start else None)
        for update in (2 * start + 1, 2 * start + 2):
            made.update(update, 1, FIGURES, checkpoint_age_s=7.0)
        made.close()
    totals = {"updates_total": 4, "samples_total": 16, "data_wait_seconds_total": 2.0, "restarts_total": 1}
    totals["checkpoints_refused_total"] = 1
    assert {name: metrics.total(f"diagonal_{name}") for name in totals} == totals
    assert metrics.last("diagonal_checkpoint_age_seconds") == 7.0
    norms = metrics.of("diagonal_gradient_norm")
    assert norms[-1].value == 2.0 and norms[-1].labels == {"stage": "distill", "network": "critic"}
    assert "REFUSED" in capsys.readouterr().out
    record = read_journal((tmp_path / UPDATES).read_text().splitlines())
    assert [entry["samples"] for entry in record.updates] == [[0, 3], [4, 7], [8, 11], [12, 15]]
    assert record.refused == 1


def test_reports_to_ray_come_at_most_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr("jobs.runs.console.time.monotonic", lambda: now[0])
    made = hooks(report=reported.append)
    for update in range(1, 41):
        now[0] += 0.5
        made.report(update, FIGURES)
    assert 3 <= len(reported) <= 4


def test_a_stop_is_told_to_the_loop_and_nothing_else_is() -> None:
    for stop in (False, True):
        made = hooks(stop)
        made.report(1, FIGURES)
        assert made.stop() is stop


def test_a_drained_node_saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "PREEMPTION_EVERY_S", 0.0)
    saved: list[bool] = []

    def save(state: TrainState, *, wait: bool = False) -> None:
        saved.append(wait)

    made = hooks(preempted=lambda: not saved)
    monkeypatch.setattr(made._checkpointer, "save", save)
    made.report(1, FIGURES)
    made.report(2, FIGURES)
    assert saved == [True]


def test_curves_hold_losses_and_norms_and_are_drawn(tmp_path: Path) -> None:
    entries = [{**FIGURES, "update": update, "stage": 1} for update in (1, 2)]
    assert curves(entries) == {"critic": ([1, 2], [1.0, 1.0]), "critic_gradient_norm": ([1, 2], [2.0, 2.0])}
    assert not set(curves(entries)) & OWN
    save_curves(entries, tmp_path / "losses.png", "distill")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"


def test_sample_captions_are_of_unseen_scenes_or_the_first_prompts() -> None:
    tiny = Config.from_preset("tiny")
    assert len(sample_captions(tiny, ["a"])) == tiny.train.sample_clips
    assert sample_captions(Config.from_preset("wan-1.3b"), ["a", "b", "c"]) == ["a", "b"]


WATCHED = """
import sys, threading, time
from jobs.workers.watchdog import Watchdog
from tests.recorded_metrics import RecordedMetrics
dog = Watchdog(0.5, "distill, rank 1")
for _ in range(int(sys.argv[1])):
    dog.beat()
    time.sleep(0.1)
if sys.argv[2] == "close":
    dog.close()
time.sleep(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("beats", "end", "status"), [(10, "hang", STALLED), (1, "close", 0), (0, "hang", 0)])
def test_a_process_without_progress_ends_itself_and_says_where_it_stood(beats: int, end: str, status: int) -> None:
    command = [sys.executable, "-c", WATCHED, str(beats), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert ("distill, rank 1: no progress for 0.5 s" in done.stderr) is bool(status)
    assert ("most recent call first" in done.stderr) is bool(status)


def test_the_first_cause_is_no_mere_consequence_of_another_ranks() -> None:
    said = first_cause(
        {
            0: RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1"),
            1: ValueError("a bad\n  level"),
            2: RuntimeError("Timed out waiting 1000ms"),
            3: GroupLostError(),
        }
    )
    assert said == "rank 1: ValueError: a bad level; then ranks 0, 2, 3"


def test_a_jobs_processes_get_its_s3_settings_and_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = passing_on({"AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "r", "HOME": "/elsewhere"})
    monkeypatch.setenv("AWS_DEFAULT_REGION", "own")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    home = os.environ["HOME"]
    hook()
    assert (os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_DEFAULT_REGION"]) == ("s", "own")
    assert os.environ["HOME"] == home
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(("seconds", "said"), [(42, "42 s"), (720, "12 min"), (9000, "2.5 h"), (200000, "2.3 days")])
def test_times_are_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert duration(seconds) == said
