"""What decides a training run's next update, as flat, named tensors: the only thing that is checkpointed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from diagonal.errors import require
from diagonal.training.distributed import own_rank
from diagonal.training.ema import Ema

Saved = Mapping[str, TensorStorageMetadata]


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
                if like_weights
                else torch.zeros(saved[key].size, dtype=dtype)
            )
        return room

    def _average(self) -> dict[str, Tensor]:
        if self.ema is None:
            return {}
        state = self.ema.state_dict()
        return {"ema/started": state["started"]} | {f"ema/shadow/{key}": v for key, v in state["shadow"].items()}


def _random_states() -> dict[str, Tensor]:
    prefix = f"rng/rank{own_rank():02d}"
    states = {f"{prefix}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{prefix}/cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(tensors: Mapping[str, Tensor]) -> None:
    mine = _below(tensors, f"rng/rank{own_rank():02d}/")
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
