"""Checkpoints of a training run: all that decides the next update, whole or not at all, for any number of ranks."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from diagonal.errors import require
from diagonal.training import manifest
from diagonal.training.ema import Ema
from diagonal.training.manifest import CheckpointError
from diagonal.training.parallel import any_rank

Saved = Mapping[str, TensorStorageMetadata]

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What decides the next update: the only thing that is checkpointed.

    `update` counts finished updates, `epoch` and `samples_seen` are the data's position. An optimizer has the name of
    the network it trains. Learning rates and the like belong to the run's configuration and are not kept here.
    Global random generators are kept by rank. Build it after `parallelize`; a `Stateful` of flat, named tensors.
    """

    stage: int
    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    ema: Ema | None = None
    update: int = 0
    epoch: int = 0
    samples_seen: int = 0

    def __post_init__(self) -> None:
        for name in self.optimizers:
            require(name in self.networks, "optimizers", name, f"names of networks: {sorted(self.networks)}")

    @property
    def progress(self) -> dict[str, int]:
        """Where the run stands, as the manifest says it."""
        names = ("stage", "update", "epoch", "samples_seen")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Tensor]:
        """`progress`, `rng/<rank>/<device>`, `networks/<name>/<parameter>`, `optimizers/<name>/<parameter>/<entry>`,
        `ema/started` and `ema/<parameter>`; weights, moments and averages are the live tensors."""
        tensors = {"progress": torch.tensor(list(self.progress.values()))} | _random_states()
        for name, network in self.networks.items():
            tensors |= {f"networks/{name}/{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= _moments(name, optimizer, self.networks[name])
        return tensors | self._average()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state of the same networks; a rank without a saved random generator keeps its own."""
        for name, value in zip(self.progress, tensors["progress"].tolist(), strict=True):
            setattr(self, name, value)
        for name, network in self.networks.items():
            network.load_state_dict(_below(tensors, f"networks/{name}/"))
        for name, optimizer in self.optimizers.items():
            _set_moments(optimizer, self.networks[name], _below(tensors, f"optimizers/{name}/"))
        if self.ema is not None:
            shadow = _below(tensors, "ema/shadow/")
            self.ema.load_state_dict({"started": tensors["ema/started"], "shadow": shadow})
        _set_random_states(tensors)

    def template(self, saved: Saved) -> dict[str, Tensor]:
        """Tensors to read `saved` into, sharded as this state is: its own, and room for the optimizers' moments.

        Raises `FieldError` where a name or a shape differs.
        """
        tensors = {key: value for key, value in self.state_dict().items() if not key.startswith("optimizers/")}
        tensors = {key: value for key, value in tensors.items() if not key.startswith("rng/") or key in saved}
        expected = {key for key in saved if not key.startswith(("rng/", "optimizers/"))}
        wrong = sorted(expected ^ {key for key in tensors if not key.startswith("rng/")})
        require(not wrong, "checkpoint.names", wrong[:8], "exactly the networks and averages of this run")
        for key, value in tensors.items():
            found, own = tuple(saved[key].size), tuple(value.shape)
            require(found == own, f"checkpoint.{key}", found, f"the shape {own} of this run")
        return tensors | self._room_for_moments(saved)

    def _room_for_moments(self, saved: Saved) -> dict[str, Tensor]:
        room = {}
        for key in (key for key in saved if key.startswith("optimizers/")):
            _, network, name, _ = key.split("/")
            require(network in self.optimizers, f"checkpoint.{key}", network, f"one of {sorted(self.optimizers)}")
            parameter, dtype = self.networks[network].get_parameter(name), saved[key].properties.dtype
            like_weights = saved[key].size == parameter.shape
            room[key] = (
                torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                if like_weights else torch.zeros(saved[key].size, dtype=dtype)
            )
        return room

    def _average(self) -> dict[str, Tensor]:
        if self.ema is None:
            return {}
        state = self.ema.state_dict()
        return {"ema/started": state["started"]} | {f"ema/shadow/{key}": v for key, v in state["shadow"].items()}


def save(state: TrainState, folder: str | os.PathLike[str], *, shared: bool = True) -> Path:
    """Write `state` to `folder`, which appears whole or not at all; collective. Returns the folder.

    `shared`: all ranks write one folder. Otherwise each rank passes a folder of its own, whose files are later merged
    into one (as Ray Train does); file names never clash. An older folder of that name is replaced.
    """
    target, rank = Path(folder).absolute(), _rank()
    partial = target.with_name(f".{target.name}.partial")
    leads = rank == 0 or not shared
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    token = _from_rank_0(uuid.uuid4().hex)  # also a barrier: the folder exists
    writer = dcp.FileSystemWriter(partial, sync_files=True)
    dcp.save(state.state_dict(), storage_writer=writer, no_dist=not dist.is_initialized())
    manifest.write(partial, rank, _world_size(), token, state.progress)
    _barrier()
    if leads:
        _move_into_place(partial, target)
    _barrier()
    return target


def load(state: TrainState, folder: str | os.PathLike[str]) -> None:
    """Check `folder` and read it into `state`, whose networks may be sharded over another number of ranks; collective.

    Raises `CheckpointError` on every rank when a file is missing or altered, `FieldError` when it is of other networks.
    """
    source, fault = Path(folder), None
    try:
        manifest.check_files(source, manifest.read_all(source)[_rank() :: _world_size()])
    except CheckpointError as error:
        fault = error
    if any_rank(fault is not None, device=_device(state)):
        raise fault or CheckpointError(source, "another rank found it incomplete or altered")
    reader = dcp.FileSystemReader(source)
    saved = reader.read_metadata().state_dict_metadata
    tensors = state.template({key: value for key, value in saved.items() if isinstance(value, TensorStorageMetadata)})
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    state.load_state_dict(tensors)


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint below `root` whose every file is as it was written; rank 0 looks, all ranks follow."""
    return _from_rank_0(_newest_whole(Path(root)) if _rank() == 0 else None)


def retain(root: str | os.PathLike[str], keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints below `root` (on rank 0). Returns the deleted folders."""
    require(keep >= 1, "keep_checkpoints", keep, "a whole number of at least 1")
    if _rank() != 0:
        return []
    old = _by_age(Path(root))[keep:]
    for folder in old:
        shutil.rmtree(folder)
    return old


def folder_name(update: int) -> str:
    """Name of the checkpoint after `update` updates; names sort by age."""
    return f"update-{update:08d}"


def _random_states() -> dict[str, Tensor]:
    prefix = f"rng/rank{_rank():02d}"
    states = {f"{prefix}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{prefix}/cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(tensors: Mapping[str, Tensor]) -> None:
    mine = _below(tensors, f"rng/rank{_rank():02d}/")
    if "cpu" in mine:
        torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])


def _moments(name: str, optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """An optimizer's state by parameter name; nothing for a parameter (or an optimizer) that never stepped."""
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    found = {}
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            require(isinstance(value, Tensor), f"optimizers.{name}.{entry}", value, "a tensor")
            found[f"optimizers/{name}/{names[id(parameter)]}/{entry}"] = value
    return found


def _set_moments(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.split("/")
        state.setdefault(parameters.index(id(network.get_parameter(name))), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _by_age(root: Path) -> list[Path]:
    """Checkpoints below `root` with all their manifests, newest first; their files are not read."""
    found = []
    for folder in _folders(root):
        try:
            found.append((manifest.read_all(folder)[0]["update"], folder.name, folder))
        except CheckpointError as error:
            _log.warning("skipped: %s", error)
    return [folder for _, _, folder in sorted(found, reverse=True)]


def _newest_whole(root: Path) -> Path | None:
    for folder in _by_age(root):
        try:
            manifest.check_files(folder, manifest.read_all(folder))
        except CheckpointError as error:
            _log.warning("skipped: %s", error)
            continue
        return folder
    return None


def _folders(root: Path) -> Iterable[Path]:
    visible = root.iterdir() if root.is_dir() else ()
    return [path for path in visible if path.is_dir() and not path.name.startswith(".")]


def _move_into_place(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    manifest.sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _from_rank_0(value: Any) -> Any:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _device(state: TrainState) -> torch.device:
    return next(parameter for network in state.networks.values() for parameter in network.parameters()).device
