"""One rank of a stage: its place, device and mesh, its share of the data, and the hooks of its loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from diagonal.config import Config
from diagonal.metrics import MetricsBackend
from diagonal.model.base_model import load_text
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.schedule import StepSchedule
from diagonal.storage import Folder
from diagonal.training import memory
from diagonal.training.batch_partition import own_samples
from diagonal.training.checkpoint import Checkpointer
from diagonal.training.distill import stage_schedule
from diagonal.training.distributed import gloo_group
from diagonal.training.loop import Hooks, Plan
from diagonal.training.parallel import device_mesh
from diagonal.training.stage import Load, build_stage
from diagonal.training.state import TrainState
from jobs.ray_metrics import ray_metrics
from jobs.runs.layouts import read_layouts
from jobs.runs.plan import estimate
from jobs.runs.run import Run, say
from jobs.runs.trackers import trackers
from jobs.runs.update_log import FolderSync
from jobs.workers.control import StopRequests
from jobs.workers.data_feed import Feed
from jobs.workers.reporting import RankInfo, Reporter, StageHooks
from jobs.workers.samples import SampleVideos
from jobs.workers.stage_metrics import StageFlops, StageMetrics
from jobs.workers.watchdog import Watchdog


@dataclass
class Worker:
    """What one rank of a stage knows and holds while it runs. Use as a context: the end closes what it opened."""

    run: Run
    place: RankInfo
    device: torch.device
    watchdog: Watchdog
    control: Any = None
    has_bar: bool = False
    on_ray: bool = True
    progress: StageHooks | None = None
    checkpointer: Checkpointer | None = None

    @classmethod
    def join(cls, settings: Mapping[str, Any]) -> Worker:
        """The worker that Ray Train started this process as."""
        context = ray.train.get_context()
        run, rank = Run.from_settings(settings), context.get_world_rank()
        cuda = torch.cuda.is_available() and run.config.train.gpus_per_worker > 0
        group = gloo_group(run.config.train.stall_timeout_s)
        place = RankInfo(settings["stage"], rank, context.get_world_size(), group)
        watchdog = Watchdog(run.config.train.stall_timeout_s, f"{place.stage}, rank {rank}")
        device = ray.train.torch.get_device() if cuda else torch.device("cpu")
        return cls(run, place, device, watchdog, settings["control"], settings["has_bar"])

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.close()
        if self.progress is not None and self.progress.reporter is not None:
            self.progress.reporter.close()

    @property
    def config(self) -> Config:
        return self.run.config

    def check_memory(self) -> None:
        """Refuse a stage that this rank's GPU has no room for, before anything is loaded."""
        if self.device.type != "cuda":
            return
        layouts, available = read_layouts(self.run), torch.cuda.get_device_properties(self.device).total_memory
        for stage in (0,) if self.place.stage == "ode_init" else (1, 2):
            memory.check(estimate(self.config, layouts, stage, self.place.world_size), available)

    def text(self) -> TextEncoder:
        """The base model's text encoder, in the compute type, on the worker's device."""
        dtype = getattr(torch, self.config.model.compute_dtype)
        return load_text(self.run.base, self.config, dtype).to(self.device)

    def mesh(self) -> dist.device_mesh.DeviceMesh | None:
        """The mesh of the workers that there are; without groups of nodes where their number no longer divides."""
        group = self.config.train.shard_group
        group = group if group and self.place.world_size % group == 0 else 0
        return device_mesh(self.place.world_size, self.device.type, group)

    def build_stage(self, stage: int, load: Load, negative: Tensor | None = None) -> tuple[TrainState, Plan[Any]]:
        """`training.stage.build_stage` on this worker's device and mesh."""
        return build_stage(self.config, stage, self.device, load, negative=negative, mesh=self.mesh())

    def begin(
        self, state: TrainState, feed: Feed, network: CausalWan, text: TextEncoder, inherited: Folder | None = None
    ) -> tuple[Iterator[dict[str, Any]], Hooks]:
        """Restore the stage's newest checkpoint into `state`, or the one in `inherited` where it has none yet; this
        rank's data from there on, and the loop's hooks.

        Videos of the feed's captions are drawn by `network` every `train.sample_every` updates.
        """
        folder, place = self.run.folder / "train" / self.place.stage, self.place
        self.checkpointer = Checkpointer(folder / "checkpoints", self.config.distill.keep_checkpoints)
        restored = self.checkpointer.restore(state)
        if restored is None and inherited is not None:
            Checkpointer(inherited, keep=1).restore(state)
            if place.rank == 0:
                say(f"{place.stage}: inherits networks, optimizers and average of {inherited}, update {state.update}")
        reporter = None
        if place.rank == 0:
            reporter = self._reporter(FolderSync(folder), feed)
            reporter.started(state.update, restored)
        own = len(own_samples(1, feed.batch_size, place.rank, place.world_size))
        drawing = self.config.train.sample_every and feed.captions
        videos = SampleVideos(self.config, self.run.base, text, feed.captions, self.device) if drawing else None
        self.progress = StageHooks(
            place,
            self.checkpointer,
            reporter,
            weight=own / feed.batch_size,
            last=feed.updates,
            stop=StopRequests(self.control),
            beat=self.watchdog.beat,
            report=ray.train.report if self.on_ray else None,
            preempted=_Preempted() if self.on_ray else None,
            sample=_Sampling(self, network, videos, feed.updates) if videos else None,
        )
        self.progress.state = state
        batches = feed.batches(state.update, place.rank, place.world_size)
        return batches, Hooks(self.progress.report, self.progress.save, self.progress.stop)

    def _reporter(self, sync: FolderSync, feed: Feed) -> Reporter:
        """What rank 0 tells of the stage."""
        first = self.place.stage == "ode_init"
        effort = StageFlops.of(self.run, (0,) if first else (1, 2), self.device, self.place.world_size)
        metrics = StageMetrics(self._metrics(), self.place.stage, feed.updates, effort)
        every = (self.config.ode_init if first else self.config.distill).checkpoint_every
        show = self.control.show.remote if self.has_bar else None
        name, settings = f"{self.run.name}/{self.place.stage}", self.config.to_dict()
        track = partial(trackers, self.config.train.trackers, name, settings, sync.local)
        return Reporter(self.place, sync, metrics, feed.updates, feed.batch_size, every, show, track)

    def _metrics(self) -> MetricsBackend:
        return ray_metrics()


class _Preempted:
    """Whether Ray says, for the first time, that a node of this stage is taken away; collective."""

    def __init__(self) -> None:
        self._known = False

    def __call__(self) -> bool:
        info = ray.train.get_preemption_info()
        first, self._known = info is not None and not self._known, info is not None
        return first


class _Sampling:
    """Draws sample videos when it is time: all ranks run the rollout, rank 0 decodes and writes."""

    def __init__(self, worker: Worker, network: CausalWan, videos: SampleVideos, last: int) -> None:
        self._worker, self._network, self._videos, self._last = worker, network, videos, last

    def __call__(self, update: int, stage: int) -> None:
        if update % self._worker.config.train.sample_every and update != self._last:
            return
        latents = self._videos.draw(self._network, self._schedule(stage))
        progress = self._worker.progress
        if progress is None or progress.reporter is None:
            return
        folder: Path = progress.reporter.folder / "samples"
        sheet = self._videos.write(latents, folder, f"update-{update:08d}")
        progress.reporter.pictures(update, sheet)
        say(f"{self._worker.place.stage}: samples and curves after update {update}")

    def _schedule(self, stage: int) -> StepSchedule:
        """What the stage trains; stage 0 has none of its own and shows the diagonal."""
        return stage_schedule(self._worker.config, stage or 2)
