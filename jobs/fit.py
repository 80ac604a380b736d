"""How a stage runs on Ray Train: workers and their slices of rows, checkpoints, metrics, progress."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.data import DataContext
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.metrics import Counter, Gauge, Histogram

from diagonal.config import Config
from diagonal.errors import require
from diagonal.metrics import FactorySink
from diagonal.model.text import TextEncoder
from diagonal.model.weights import load_text
from diagonal.training import checkpoint
from diagonal.training.checkpoint import TrainState
from diagonal.training.loop import Hooks
from diagonal.training.parallel import ParallelPlan, Precision, device_mesh
from jobs.ray_cluster import connect
from jobs.run import Run, say

Row = dict[str, Any]
PROGRESS_EVERY_S = 5.0


def fit(
    run: Run,
    stage: str,
    worker: Callable[[dict[str, Any]], None],
    rows: Sequence[Row],
    *,
    read: tuple[type, dict[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Run `worker` on Ray Train until it ends; a stage that was cut off goes on from its last checkpoint.

    `rows` are all samples of the run in order; rank r of n reads rows r, r+n, ... through `read` (a class that Ray
    Data maps over them, and its arguments). The worker is called with the run's settings (see `Worker`).
    """
    connect()
    config = run.config.train
    DataContext.get_current().execution_options.preserve_order = True
    DataContext.get_current().enable_progress_bars = False
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            **run.to_settings(), "stage": stage, **(settings or {}),
        },
        datasets={_shard_name(rank): _dataset(rows[rank :: config.workers], read) for rank in range(config.workers)},
        dataset_config=DataConfig(datasets_to_split=[]),
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # at import Ray swaps in the class of Train V2
            name=stage, storage_path=str(run.folder / "train"),
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},  # else every line comes twice
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.config.distill.keep_checkpoints),
        ),
    )
    say(f"{stage}: {len(rows)} samples on {config.workers} workers")
    trainer.fit()


def _dataset(rows: Sequence[Row], read: tuple[type, dict[str, Any]] | None) -> ray.data.Dataset:
    dataset = ray.data.from_items(list(rows), override_num_blocks=max(1, min(16, len(rows) // 64)))
    if read is None:
        return dataset
    stage, arguments = read
    return dataset.map_batches(stage, fn_constructor_kwargs=arguments, batch_size=16, num_cpus=0.5, concurrency=1)


def _shard_name(rank: int) -> str:
    return f"rank-{rank}"


@dataclass(frozen=True)
class Worker:
    """What one rank of a stage knows: its configuration, place, device and mesh."""

    run: Run
    stage: str
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, settings: Mapping[str, Any]) -> Worker:
        """The worker that Ray Train started this process as."""
        context = ray.train.get_context()
        cuda = torch.cuda.is_available() and settings["config"]["train"]["gpus_per_worker"] > 0
        return cls(
            Run.from_settings(settings), settings["stage"], context.get_world_rank(), context.get_world_size(),
            ray.train.torch.get_device() if cuda else torch.device("cpu"),
        )

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def plan(self) -> ParallelPlan:
        """Precision and activation checkpointing of a trained network."""
        return ParallelPlan(Precision(self.config.model.compute_dtype), self.config.train.checkpoint_activations)

    def text(self) -> TextEncoder:
        """The base model's text encoder, in the compute type, on the worker's device."""
        dtype = getattr(torch, self.config.model.compute_dtype)
        return load_text(self.run.base, self.config, dtype).to(self.device)

    def mesh(self) -> dist.device_mesh.DeviceMesh | None:
        return device_mesh(self.world_size, self.device.type, self.config.train.shard_group)

    def resume(self, state: TrainState) -> None:
        """Load the newest checkpoint of this stage, if there is one."""
        found = ray.train.get_checkpoint()
        if found is None:
            return
        with found.as_directory() as folder:
            checkpoint.load(state, folder)
        if self.rank == 0:
            say(f"{self.stage}: goes on after update {state.update}")

    def rows(self, start: int, global_batch_size: int) -> Iterator[dict[str, Any]]:
        """This rank's columns for each update, from global sample `start` on."""
        size = global_batch_size // self.world_size
        shard = ray.train.get_dataset_shard(_shard_name(self.rank))
        for batch in shard.iter_batches(batch_size=size, batch_format="numpy", drop_last=True):
            if batch["sample"][0] >= start:
                yield batch

    def hooks(self, last: int) -> Hooks:
        """Reports go to Ray's metrics and to the log, checkpoints to the run folder."""
        return Hooks(report=_Progress(self, last), save=self._save)

    def _save(self, state: TrainState) -> None:
        name = checkpoint.folder_name(state.update)
        with tempfile.TemporaryDirectory() as folder:
            own = checkpoint.save(state, Path(folder) / name, shared=False)
            ray.train.report(dict(state.progress), checkpoint=Checkpoint.from_directory(own), checkpoint_dir_name=name)


class _Progress:
    """Sends figures of every update to Ray's metrics, and now and then one line to the log; on rank 0."""

    def __init__(self, worker: Worker, last: int) -> None:
        self._worker, self._last = worker, last
        self._sink = FactorySink(Counter, Gauge, Histogram)
        self._printed_s, self._started_s, self._first = 0.0, time.monotonic(), 0

    def __call__(self, update: int, figures: Mapping[str, float]) -> None:
        if self._worker.rank != 0:
            return
        stage, sink = self._worker.stage, self._sink
        self._first = self._first or update
        rate = (update - self._first + 1) / (time.monotonic() - self._started_s)
        sink.inc("diagonal_updates_total", 1, stage=stage, network="all")
        sink.observe("diagonal_update_seconds", figures["update_s"], stage=stage)
        sink.set("diagonal_updates_per_second", rate, stage=stage)
        if figures.get("skipped"):
            sink.inc("diagonal_nonfinite_updates_total", 1, stage=stage)
        for name, value in figures.items():
            if name.endswith("gradient_norm"):
                network = name.removesuffix("gradient_norm").rstrip("_") or "generator"
                sink.set("diagonal_gradient_norm", value, stage=stage, network=network)
            elif name not in ("update_s", "skipped"):
                sink.set("diagonal_loss", value, stage=stage, loss=name)
        now_s = time.monotonic()
        if now_s - self._printed_s > PROGRESS_EVERY_S or update == self._last:
            self._printed_s = now_s
            left_s = (self._last - update) / rate
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "skipped")
            say(f"{stage}: update {update}/{self._last}, {rate:.2f}/s, about {left_s:.0f} s left; {shown}")


def check_batch(global_batch_size: int, workers: int, field: str) -> None:
    """Refuse a global batch that workers cannot share evenly."""
    require(global_batch_size % workers == 0, field, global_batch_size, f"a multiple of train.workers = {workers}")
