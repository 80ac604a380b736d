"""The training loop of every stage: batches in, optimizer updates, reports and checkpoints out through callables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diagonal.config import DistillConfig, OdeInitConfig
from diagonal.training.batch_partition import micro_batches, require_own
from diagonal.training.distributed import own_rank, world_size
from diagonal.training.parallel import any_rank, clip_gradients, finish_gradients, rollout_scope
from diagonal.training.state import TrainState

Batch = TypeVar("Batch")
Part = TypeVar("Part")
Terms = dict[str, Tensor]
Figures = dict[str, float]


class TooManyNonFiniteError(RuntimeError):
    """Updates in a row were skipped because their losses or gradients were not finite."""


class Stopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """The loop ended before its last update, as asked; the checkpoint of `update` is whole."""

    def __init__(self, update: int) -> None:
        super().__init__(f"stopped after update {update}")
        self.update = update


class Save(Protocol):
    """Keeps a checkpoint; with `wait` it is never skipped and is whole on return (`Checkpointer.save`)."""

    def __call__(self, state: TrainState, *, wait: bool = False) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What surrounds a loop: `report(update, figures)` after each update, `save` at checkpoints, and `stop()`, asked
    after each update: one rank's yes stops all (a preemption, a user's request)."""

    report: Callable[[int, Mapping[str, float]], None]
    save: Save
    stop: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Plan(Generic[Batch]):
    """What a loop does: up to update `last`, with `step(update, batch)` giving the update's figures.

    `sample_tokens` is the number of latent tokens of a clip, for the reports.
    """

    last: int
    checkpoint_every: int
    global_batch_size: int
    max_nonfinite: int
    step: Callable[[int, Batch], Figures]
    sample_tokens: int = 0


def run_loop(state: TrainState, plan: Plan[Batch], batches: Iterator[Batch], hooks: Hooks) -> None:
    """Train from `state.update` to `plan.last`; `batches` must begin at `state.samples_seen`.

    Figures reported are the step's and, of this rank: `samples` (of all ranks, since the run's start), `tokens` (of the
    update's clips), `data_wait_s` (for the batch) and `update_s` (computing); a long wait is a starved input.
    Raises `Stopped` once `hooks.stop` asked for it, after a checkpoint of that update; `TooManyNonFiniteError` after
    `max_nonfinite` skipped updates in a row; both on all ranks together.
    """
    skipped = 0
    for update in range(state.update + 1, plan.last + 1):
        asked_s = time.monotonic()
        batch = next(batches)
        began_s = time.monotonic()
        figures = plan.step(update, batch)
        state.update, state.samples_seen = update, update * plan.global_batch_size
        hooks.report(
            update,
            {
                **figures,
                "samples": state.samples_seen,
                "tokens": plan.global_batch_size * plan.sample_tokens,
                "data_wait_s": began_s - asked_s,
                "update_s": time.monotonic() - began_s,
            },
        )
        skipped = skipped + 1 if figures.get("skipped") else 0
        if skipped >= plan.max_nonfinite:
            raise TooManyNonFiniteError(
                f"update {update}: losses or gradients were not finite {skipped} times in a row, "
                f"and distill.max_nonfinite = {plan.max_nonfinite}"
            )
        last = update == plan.last
        stops = not last and hooks.stop is not None and any_rank(hooks.stop(), device=_device(state))
        if last or stops or update % plan.checkpoint_every == 0:
            hooks.save(state, wait=last or stops)
        if stops:
            raise Stopped(update)


@dataclass(frozen=True)
class Learner:
    """A network, its optimizer, and the norm its gradients are clipped to."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float

    def learn(
        self, parts: Sequence[tuple[Part, float]], loss: Callable[[Part], tuple[Tensor, Terms]], rate: float = 1.0
    ) -> tuple[Figures, bool]:
        """One optimizer update on micro-batches and their weights, at that share of the optimizer's learning rate; the
        means of the loss's terms, and whether the update was applied.

        The parameters stay gathered meanwhile, gradients are reduced once, and all ranks skip together when the norm
        or a loss is not finite on any: weights and moments then stay as they were.
        """
        with rollout_scope(self.network):
            terms = backward(parts, loss)
            finish_gradients(self.network)
        norm = clip_gradients(self.network.parameters(), self.clip_norm)
        values = torch.stack([*terms.values(), norm])
        applied = not any_rank(~torch.isfinite(values).all())
        if applied:
            with _at_rate(self.optimizer, rate):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return dict(zip([*terms, "gradient_norm"], values.tolist(), strict=True)), applied


@contextmanager
def _at_rate(optimizer: torch.optim.Optimizer, rate: float) -> Iterator[None]:
    """The optimizer's learning rates times `rate`, for a while: what is kept of it never depends on the update."""
    full = [group["lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, full, strict=True):
        group["lr"] = lr * rate
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr


def falling_rate(update: int, first: int, last: int, fall: float) -> float:
    """Share of the full learning rate in `update`, of a stage of updates `first + 1` to `last`: 1, then falling
    linearly over the last `fall` of them, to one step above 0. A function of the update alone, so that a resumed run
    goes the same way."""
    falling = fall * (last - first)
    return min(1.0, (last - update + 1) / falling) if falling > 0 else 1.0


def backward(parts: Sequence[tuple[Part, float]], loss: Callable[[Part], tuple[Tensor, Terms]]) -> Terms:
    """Backward of each micro-batch's weighted loss; each term's mean over this rank's samples."""
    total = sum(weight for _, weight in parts)
    means: Terms = {}
    for part, weight in parts:
        value, terms = loss(part)
        (value * weight).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + term * (weight / total)
    return means


class SampleBatch(Protocol):
    """A rank's samples of one update, which can be cut."""

    @property
    def samples(self) -> Sequence[int]: ...

    def part(self: BatchT, where: slice) -> BatchT: ...


BatchT = TypeVar("BatchT", bound=SampleBatch)


def micro_batched(batch: BatchT, update: int, settings: OdeInitConfig | DistillConfig) -> list[tuple[BatchT, float]]:
    """The rank's batch in micro-batches with their weights, so that the gradients of all ranks average to that of the
    mean over the global batch. `FieldError` where the samples are not this rank's of that update."""
    require_own(batch.samples, update, settings.batch_size, own_rank(), world_size())
    slices = micro_batches(len(batch.samples), settings.micro_batch_size, settings.batch_size, world_size())
    return [(batch.part(where), weight) for where, weight in slices]


def _device(state: TrainState) -> torch.device:
    return next(parameter for network in state.networks.values() for parameter in network.parameters()).device
