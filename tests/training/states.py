"""A small run whose state has all parts that a checkpoint keeps, and faults of a checkpoint's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from diagonal.storage import Folder
from diagonal.training import checkpoint_manifest
from diagonal.training.checkpoint import Checkpointer
from diagonal.training.ema import Ema
from diagonal.training.parallel import (
    ParallelPlan,
    Precision,
    clip_gradients,
    device_mesh,
    finish_gradients,
    full_tensors,
    parallelize,
    rollout_scope,
)
from diagonal.training.state import TrainState
from tests.training.networks import Network, rollout

NARROW = ParallelPlan(Precision(param="bfloat16"), checkpoint_blocks=True)


def fresh(seed: int, world_size: int, plan: ParallelPlan = NARROW, width: int = 6, shard_group: int = 0) -> TrainState:
    """A run's objects as a new process makes them."""
    mesh = device_mesh(world_size, "cpu", shard_group)
    networks = {}
    for number, name in enumerate(("generator", "critic")):
        network = Network(width=width, seed=seed + number)
        networks[name] = parallelize(network, network.blocks, mesh, plan, trainable=True)
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.5, 0.9)) for name, network in networks.items()
    }
    ema = Ema(networks["generator"].named_parameters(), decay=0.5, start_update=3)
    return TrainState(stage=1, networks={**networks}, optimizers=optimizers, ema=ema)


def advance(state: TrainState, updates: int) -> None:
    """Updates whose noise comes from the global generator: the critic always, the generator at 3, 5, 7 ..."""
    for _ in range(updates):
        names = ["critic"] if state.update < 3 or state.update % 2 == 0 else ["critic", "generator"]
        for name in names:
            noise = torch.randn(2, 6)
            with rollout_scope(state.networks[name]):
                rollout(state.networks[name], noise).square().mean().backward()
                finish_gradients(state.networks[name])
            clip_gradients(state.networks[name].parameters(), max_norm=1.0)
            state.optimizers[name].step()
            state.optimizers[name].zero_grad()
        if "generator" in names and state.ema is not None:
            state.ema.update(state.update)
        state.update, state.samples_seen = state.update + 1, state.samples_seen + 2
        state.epoch = state.samples_seen // 5


def contents(state: TrainState) -> dict[str, Tensor]:
    """Everything in a state, whole."""
    return full_tensors(state.state_dict())


def same(left: dict[str, Tensor], right: dict[str, Tensor], ignoring: str = "nothing") -> bool:
    left, right = ({k: v for k, v in side.items() if not k.startswith(ignoring)} for side in (left, right))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def keeper(root: Path | str, keep: int = 5) -> Checkpointer:
    return Checkpointer(Folder(str(root)), keep)


def saved(state: TrainState, root: Path | str, *updates: int) -> list[Path]:
    """Folders of whole checkpoints of `state` as if after those updates, or after its own."""
    own = keeper(root)
    for update in updates or (state.update,):
        state.update = update
        own.save(state, wait=True)
    return [folder_of(root, update) for update in updates or (state.update,)]


def folder_of(root: Path | str, update: int) -> Path:
    """The one folder of that update."""
    (found,) = Path(root).glob(f"update-{update:08d}-*")
    return found


def truncate(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    os.truncate(path, path.stat().st_size - 1)


def flip(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / checkpoint_manifest.name_of(0)).unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / checkpoint_manifest.name_of(0), 20)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / checkpoint_manifest.name_of(0)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_version(folder: Path) -> None:
    edit_manifest(folder, format_version=3)


def lose_a_rank(folder: Path) -> None:
    edit_manifest(folder, world_size=2)
