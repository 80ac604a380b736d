"""The training loop of every stage: batches in, optimizer updates, reports and checkpoints out through callables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from diagonal.config import Config
from diagonal.model.attention import BlockCausal
from diagonal.training.checkpoint import TrainState
from diagonal.training.distill import Networks, PromptBatch, Terms, critic_loss, generator_loss, mean_terms
from diagonal.training.ema import Ema
from diagonal.training.ode_init import PairBatch, ode_loss
from diagonal.training.parallel import any_rank, clip_gradients, finish_gradients, rollout_scope

Batch = TypeVar("Batch")
Figures = dict[str, float]


class TooManyNonFiniteError(RuntimeError):
    """Updates in a row were skipped because their gradients were not finite."""


@dataclass(frozen=True)
class Hooks:
    """Where a loop's results go: `report(update, figures)` after each update, `save(state)` at checkpoints."""

    report: Callable[[int, Mapping[str, float]], None]
    save: Callable[[TrainState], None]


@dataclass(frozen=True)
class Plan(Generic[Batch]):
    """What a loop does: up to update `last`, with `step(update, batch)` giving the update's figures."""

    last: int
    checkpoint_every: int
    global_batch_size: int
    max_nonfinite: int
    step: Callable[[int, Batch], Figures]


def run_loop(state: TrainState, plan: Plan[Batch], batches: Iterator[Batch], hooks: Hooks) -> None:
    """Go on from `state.update` to `plan.last`; `batches` must begin at `state.samples_seen`.

    `TooManyNonFiniteError` after `max_nonfinite` skipped updates in a row.
    """
    skipped = 0
    for update in range(state.update + 1, plan.last + 1):
        started_s = time.monotonic()
        figures = plan.step(update, next(batches))
        state.update, state.samples_seen = update, update * plan.global_batch_size
        skipped = skipped + 1 if figures.get("skipped") else 0
        if skipped >= plan.max_nonfinite:
            raise TooManyNonFiniteError(f"update {update}: gradients were not finite {skipped} times in a row")
        hooks.report(update, {**figures, "update_s": time.monotonic() - started_s})
        if update % plan.checkpoint_every == 0 or update == plan.last:
            hooks.save(state)


@dataclass(frozen=True)
class Learner:
    """A network, its optimizer, and the norm its gradients are clipped to."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float

    def learn(self, backward: Callable[[], Terms]) -> tuple[Figures, bool]:
        """One optimizer update from the gradients that `backward` leaves; its terms, and whether it was applied.

        The parameters stay gathered meanwhile, gradients are reduced once, and all ranks skip together when the norm
        is not finite.
        """
        with rollout_scope(self.network):
            terms = backward()
            finish_gradients(self.network)
        norm = clip_gradients(self.network.parameters(), self.clip_norm)
        applied = not any_rank(~torch.isfinite(norm))
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        figures = {name: float(term) for name, term in terms.items()}
        return {**figures, "gradient_norm": float(norm)}, applied


@dataclass(frozen=True)
class OdeInitStep:
    """One update of stage 0."""

    config: Config
    learner: Learner
    ema: Ema
    mask: BlockCausal

    def __call__(self, update: int, batch: PairBatch) -> Figures:
        figures, applied = self.learner.learn(lambda: self._backward(batch))
        if applied:
            self.ema.update(update)
        return {**figures, "skipped": float(not applied)}

    def _backward(self, batch: PairBatch) -> Terms:
        total, size = len(batch.samples), self.config.ode_init.micro_batch_size
        terms = []
        for start in range(0, total, size):
            part = PairBatch(
                batch.states[start : start + size], batch.levels, batch.text[start : start + size],
                batch.samples[start : start + size],
            )
            loss = ode_loss(self.learner.network, self.config, part, self.mask) * (len(part.samples) / total)
            loss.backward()
            terms.append(loss.detach())
        return {"ode_regression": torch.stack(terms).sum()}


@dataclass(frozen=True)
class DistillStep:
    """One update of stage 1 or 2: the critic always, the generator every `generator_every`-th."""

    config: Config
    stage: int
    networks: Networks
    generator: Learner
    critic: Learner
    ema: Ema

    def __call__(self, update: int, batch: PromptBatch) -> Figures:
        figures: Figures = {}
        skipped = False
        if update % self.config.distill.generator_every == 0:
            found, applied = self.generator.learn(lambda: self._generator_backward(batch, update))
            if applied:
                self.ema.update(update)
            figures |= {"generator_gradient_norm": found.pop("gradient_norm"), **found}
            skipped = not applied
        with rollout_scope(self.networks.generator):
            found, applied = self.critic.learn(lambda: self._critic_backward(batch, update))
        figures |= {"critic": found["critic"], "critic_gradient_norm": found["gradient_norm"]}
        return {**figures, "skipped": float(skipped or not applied)}

    def _generator_backward(self, batch: PromptBatch, update: int) -> Terms:
        terms, shares = [], []
        for part in batch.split(self.config.distill.micro_batch_size):
            loss, found = generator_loss(self.networks, self.config, part, update, self.stage)
            shares.append(len(part.samples) / len(batch.samples))
            (loss * shares[-1]).backward()
            terms.append(found)
        return mean_terms(terms, shares)

    def _critic_backward(self, batch: PromptBatch, update: int) -> Terms:
        terms, shares = [], []
        for part in batch.split(self.config.distill.micro_batch_size):
            loss = critic_loss(self.networks, self.config, part, update, self.stage)
            shares.append(len(part.samples) / len(batch.samples))
            (loss * shares[-1]).backward()
            terms.append({"critic": loss.detach()})
        return mean_terms(terms, shares)
