"""What starts, updates and checkpoints of a stage tell of themselves; rank 0 alone tells, so nothing counts twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diagonal.evaluate.bench.rates import ceiling_tflops
from diagonal.metrics import MetricsBackend
from diagonal.model.architecture import TransformerLayout
from diagonal.model.flops import UpdateFlops, update_flops
from jobs.runs.layouts import read_layouts
from jobs.runs.run import Run

OWN = {"samples", "tokens", "data_wait_s", "update_s", "skipped"}  # figures that are no losses
NORM = "gradient_norm"


@dataclass(frozen=True)
class StageFlops:
    """Operations of one sample's share of an update, by stage, and what all workers' devices do in a second."""

    updates: Mapping[int, UpdateFlops]
    peak_flops: float

    @classmethod
    def of(cls, run: Run, stages: tuple[int, ...], device: torch.device, workers: int) -> StageFlops:
        """The peak is measured, by one large matrix product, on this worker's device."""
        layouts = read_layouts(run)
        student, teacher = TransformerLayout.of(layouts.student), TransformerLayout.of(layouts.teacher)
        updates = {stage: update_flops(run.config, student, teacher, stage) for stage in stages}
        return cls(updates, ceiling_tflops(device) * 1e12 * workers)

    def flops(self, stage: int, networks: set[str], samples: int) -> float:
        """Operations of an update of so many samples that these networks learned from."""
        found = self.updates[stage]
        return samples * (found.critic + (found.generator if "generator" in networks else 0))


class StageMetrics:
    """The training metrics of one stage, through any backend."""

    def __init__(self, metrics: MetricsBackend, stage: str, last: int, effort: StageFlops | None = None) -> None:
        self._metrics, self._stage, self._last, self._effort = metrics, stage, last, effort

    def started(self, update: int, workers: int, restarted: bool, refused: int) -> None:
        """The workers go on after that update; `refused` checkpoints could not be used."""
        self._metrics.inc("diagonal_restarts_total", int(restarted), stage=self._stage)
        self._metrics.inc("diagonal_checkpoints_refused_total", refused, stage=self._stage)
        self._metrics.set("diagonal_training_workers", workers, stage=self._stage)
        self._metrics.set("diagonal_training_updates_planned", self._last, stage=self._stage)
        self._metrics.set("diagonal_training_update", update, stage=self._stage)

    def update(self, update: int, number: int, figures: Mapping[str, float], samples: int, rate: float) -> None:
        """Update `update`, of stage `number`, came out so; `rate` are updates a second."""
        metrics, stage = self._metrics, self._stage
        metrics.inc("diagonal_samples_total", samples, stage=stage)
        metrics.inc("diagonal_tokens_total", figures["tokens"], stage=stage)
        metrics.inc("diagonal_data_wait_seconds_total", figures["data_wait_s"], stage=stage)
        metrics.observe("diagonal_update_seconds", figures["update_s"], stage=stage)
        metrics.set("diagonal_updates_per_second", rate, stage=stage)
        metrics.set("diagonal_training_update", update, stage=stage)
        metrics.set("diagonal_training_stage", number, stage=stage)
        metrics.inc("diagonal_nonfinite_updates_total", figures.get("skipped", 0.0), stage=stage)
        self._terms(figures)
        self._work(number, figures, samples)

    def _terms(self, figures: Mapping[str, float]) -> None:
        """Losses by name, and each network that learned by its gradient norm."""
        for name, value in figures.items():
            if name.endswith(NORM):
                network = _network(name)
                self._metrics.inc("diagonal_updates_total", 1, stage=self._stage, network=network)
                self._metrics.set("diagonal_gradient_norm", value, stage=self._stage, network=network)
            elif name not in OWN:
                self._metrics.set("diagonal_loss", value, stage=self._stage, loss=name)

    def _work(self, number: int, figures: Mapping[str, float], samples: int) -> None:
        if self._effort is None:
            return
        networks = {_network(name) for name in figures if name.endswith(NORM)}
        flops = self._effort.flops(number, networks, samples)
        self._metrics.inc("diagonal_model_flops_total", flops, stage=self._stage)
        possible = self._effort.peak_flops * max(figures["update_s"], 1e-9)
        self._metrics.set("diagonal_model_flops_utilisation_ratio", flops / possible, stage=self._stage)

    def checkpoints(self, age_s: float, interval_s: float) -> None:
        """How old the newest whole one is, and how far apart they are."""
        self._metrics.set("diagonal_checkpoint_age_seconds", age_s, stage=self._stage)
        self._metrics.set("diagonal_checkpoint_interval_seconds", interval_s, stage=self._stage)

    def saved(self, waited_s: float | None) -> None:
        """Training waited so long for a checkpoint that is now being written; None: it was left out."""
        if waited_s is None:
            self._metrics.inc("diagonal_checkpoints_skipped_total", 1, stage=self._stage)
        else:
            self._metrics.observe("diagonal_checkpoint_wait_seconds", waited_s, stage=self._stage)

    def whole(self, wrote_s: float) -> None:
        """A checkpoint is whole, and was written in so long."""
        self._metrics.observe("diagonal_checkpoint_save_seconds", wrote_s, stage=self._stage)


def _network(norm: str) -> str:
    return norm.removesuffix(NORM).rstrip("_") or "generator"
