"""Reports of a training stage without a stage: figures of an update, and what reports them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diagonal.storage import Folder
from diagonal.training.state import TrainState
from jobs.runs.update_log import FolderSync
from jobs.workers.reporting import RankInfo, Reporter, StageHooks
from jobs.workers.stage_metrics import StageMetrics
from tests.recorded_metrics import RecordedMetrics

FIGURES = {
    "critic": 1.0,
    "critic_gradient_norm": 2.0,
    "skipped": 0.0,
    "samples": 4.0,
    "tokens": 8.0,
    "update_s": 1.0,
    "data_wait_s": 0.5,
}


def reporter(folder: Path, metrics: RecordedMetrics) -> Reporter:
    stage_metrics = StageMetrics(metrics, "distill", last=4)
    outbox = FolderSync(Folder(str(folder)))
    return Reporter(RankInfo("distill", 0, 1), outbox, stage_metrics, last=4, batch_size=4, checkpoint_every=2)


def hooks(stop: bool = False, **others: Any) -> StageHooks:
    saver = SimpleNamespace(skipped=0, wrote_s=0.0, save=lambda state, wait: None)
    made = StageHooks(
        RankInfo("distill", 0, 1),
        saver,  # type: ignore[arg-type]
        None,
        weight=1.0,
        last=4,
        stop=lambda: stop,
        beat=lambda: None,
        **others,
    )
    made.state = TrainState(1, {})
    return made
