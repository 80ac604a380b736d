"""What is seen of a stage while it runs: metrics, lines in the log, the journal, trackers, samples and curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from diagonal.training.checkpoint import Checkpointer, Restored
from diagonal.training.distributed import Group
from jobs.runs.console import Interval, Pace, Position
from jobs.runs.run import say
from jobs.runs.trackers import Tracker
from jobs.runs.update_log import FolderSync, Journal
from jobs.workers.samples import save_curves, sheet_pixels
from jobs.workers.stage_metrics import OWN, StageMetrics

if TYPE_CHECKING:
    from diagonal.training.state import TrainState

PROGRESS_EVERY_S = 5.0
REPORT_EVERY_S = 5.0
PREEMPTION_EVERY_S = 5.0
REPORT, PREEMPTION, STOP = 1, 2, 4  # what rank 0 decides for all in one reduction


@dataclass(frozen=True)
class RankInfo:
    """Which stage and rank this is, how many ranks there are, and how they speak over the CPU."""

    stage: str
    rank: int
    world_size: int
    group: Group = None


class RankConsensus:
    """Rank 0's decisions and the mean of all ranks' losses, in one reduction an update."""

    def __init__(self, place: RankInfo, weight: float) -> None:
        self._place, self._weight = place, weight

    def __call__(self, figures: Mapping[str, float], decisions: int) -> tuple[dict[str, float], int]:
        """`figures` with each loss averaged over the global batch, and what rank 0 decided; collective."""
        names = [name for name in figures if name not in OWN and not name.endswith("gradient_norm")]
        lead = self._place.rank == 0
        values = [figures[name] * self._weight for name in names] + [float(decisions if lead else 0)]
        if self._place.world_size > 1:
            tensor = torch.tensor(values, dtype=torch.float64)
            dist.all_reduce(tensor, group=self._place.group)
            values = tensor.tolist()
        return {**figures, **dict(zip(names, values, strict=False))}, int(values[-1])


class Reporter:
    """Rank 0's reports of a stage: metrics, the log, the journal, trackers, curves and samples."""

    def __init__(
        self,
        place: RankInfo,
        sync: FolderSync,
        metrics: StageMetrics,
        last: int,
        batch_size: int,
        checkpoint_every: int,
        show: Callable[[Position], None] | None = None,
        track: Callable[[int], list[Tracker]] = lambda update: [],
    ) -> None:
        """`show` is given each position in place of a line now and then; `track` opens the trackers of a start."""
        self._place, self._sync, self._last, self._batch_size = place, sync, last, batch_size
        self.metrics, self._checkpoint_every = metrics, checkpoint_every
        self._journal = Journal(sync)
        self._printing, self._pace, self._show = Interval(PROGRESS_EVERY_S), Pace(), show
        self._track, self._trackers = track, list[Tracker]()

    @property
    def folder(self) -> Path:
        """Where files are written; what lies there reaches the run's folder."""
        return self._sync.local

    def started(self, update: int, restored: Restored | None) -> None:
        """Note where this start goes on from, and what was refused, loudly."""
        refused = [str(error) for error in restored.refused] if restored else []
        restarted = bool(self._journal.known.starts)
        self.metrics.started(update, self._place.world_size, restarted, len(refused))
        self._journal.start(update, time=time.time(), world_size=self._place.world_size, refused=refused)
        self._trackers = self._track(update)
        for reason in refused:
            say(f"{self._place.stage}: WARNING: REFUSED {reason}")
        if restored or restarted:
            say(f"{self._place.stage}: resumes after update {update} on {self._place.world_size} workers")
        self._pace = Pace()

    def update(self, update: int, stage: int, figures: Mapping[str, float], checkpoint_age_s: float) -> None:
        rate = self._pace.update()
        self.metrics.update(update, stage, figures, self._batch_size, rate)
        self.metrics.checkpoints(checkpoint_age_s, self._checkpoint_every / rate)
        first = (update - 1) * self._batch_size
        entry = {**figures, "stage": stage, "samples": [first, update * self._batch_size - 1]}
        self._journal.write(update, entry)
        named = {f"{self._place.stage}/{name}": value for name, value in figures.items()}
        for tracker in self._trackers:
            tracker.log(update, named)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name not in OWN)
        position = Position(update, self._last, rate, shown)
        if self._show is not None:
            self._show(position)
        elif self._printing.is_due() or update == self._last:
            say(f"{self._place.stage}: {position}")

    def pictures(self, update: int, sheet: Any = None) -> None:
        """Draw the curves and send everything; `sheet` is the path of a new contact sheet."""
        entries = self._journal.record().updates
        save_curves(entries, self._sync.local / "losses.png", f"{self._place.stage}, update {update}")
        for tracker in self._trackers if sheet is not None else ():
            tracker.picture(update, f"{self._place.stage}/samples", sheet_pixels(sheet))
        self.send()

    def send(self) -> None:
        for tracker in self._trackers:
            tracker.flush()
        self._sync.send()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._journal.close()
        self._sync.close()


class StageHooks:
    """A stage's hooks on one rank: what is reported, saved and asked after each update; every rank calls it alike."""

    def __init__(
        self,
        place: RankInfo,
        checkpointer: Checkpointer,
        reporter: Reporter | None,
        *,
        weight: float,
        last: int,
        stop: Callable[[], bool],
        beat: Callable[[], None],
        report: Callable[[dict[str, Any]], None] | None = None,
        preempted: Callable[[], bool] | None = None,
        sample: Callable[[int, int], Any] | None = None,
    ) -> None:
        self._place, self._checkpointer, self.reporter = place, checkpointer, reporter
        self._agree, self._last, self._stop, self._beat = RankConsensus(place, weight), last, stop, beat
        self._report, self._preempted, self._sample = report, preempted, sample
        self._reporting, self._looking = Interval(REPORT_EVERY_S), Interval(PREEMPTION_EVERY_S)
        self._decided = 0
        self._wrote_s, self._saved_s = checkpointer.wrote_s, time.monotonic()
        self._whole_s = self._saved_s
        self.state: TrainState | None = None

    def report(self, update: int, figures: Mapping[str, float]) -> None:
        self._beat()
        whole, self._decided = self._agree(figures, self._decisions())
        state = self.state
        assert state is not None
        if self.reporter is not None:
            self.reporter.update(update, state.stage, whole, self._checkpoint_age_s())
        if self._report is not None and self._decided & REPORT:
            self._report({"update": update, **whole})
        if self._preempted is not None and self._decided & PREEMPTION and self._preempted():
            say(f"{self._place.stage}: rank {self._place.rank}: a node is taken away, saving after update {update}")
            self.save(state, wait=True)
        if self._sample is not None:
            self._sample(update, state.stage)
            self._beat()

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        if self.reporter is not None:
            self.reporter.send()
        self._checkpoint_age_s()  # an earlier save may have become whole
        skipped = self._checkpointer.skipped
        self._checkpointer.save(state, wait=wait)
        begun = self._checkpointer.skipped == skipped
        if begun:
            self._saved_s = time.monotonic()
        if self.reporter is not None:
            self.reporter.metrics.saved(self._checkpointer.waited_s if begun else None)
        if wait:
            self._checkpoint_age_s()
        self._beat()

    def stop(self) -> bool:
        return bool(self._decided & STOP)

    def _decisions(self) -> int:
        if self._place.rank != 0:
            return 0
        bits = (REPORT * self._reporting.is_due(), PREEMPTION * self._looking.is_due(), STOP * self._stop())
        return sum(int(bit) for bit in bits)

    def _checkpoint_age_s(self) -> float:
        """Since the newest checkpoint that is whole was begun; since the start while there is none."""
        if self._checkpointer.wrote_s != self._wrote_s:
            self._wrote_s, self._whole_s = self._checkpointer.wrote_s, self._saved_s
            if self.reporter is not None:
                self.reporter.metrics.whole(self._wrote_s)
        return time.monotonic() - self._whole_s
