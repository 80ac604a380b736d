"""Exponential moving average of a network's weights, in float32, on the shards that each rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diagonal.errors import require


class Ema:
    """Average `shadow <- decay*shadow + (1 - decay)*weights`, created from the weights at update `start_update`.

    `parameters` are `(name, parameter)` pairs as `Module.named_parameters()` gives them after `parallelize`, so the
    average of a sharded network is sharded alike. Until `start_update` the average is the weights themselves.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float, start_update: int) -> None:
        require(0.0 <= decay < 1.0, "ema_decay", decay, "a number in [0, 1)")
        self.decay = decay
        self.start_update = start_update
        self.started = False
        self._parameters = dict(parameters)
        self.shadow = {name: _master(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Follow the weights after the generator's step in update number `update` (the run's counter)."""
        weight = 1.0 - self.decay if self.started else 1.0
        for name, parameter in self._parameters.items():
            _local(self.shadow[name]).lerp_(_local(parameter).float(), weight)
        self.started = self.started or update >= self.start_update

    def state_dict(self) -> dict[str, Any]:
        """`{"started": int64 scalar, "shadow": {name: tensor}}`; the tensors are the average's own, not copies."""
        return {"started": torch.tensor(int(self.started)), "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over an average, in place; names and shapes must be this one's."""
        wrong = sorted(self.shadow.keys() ^ state["shadow"].keys())
        require(not wrong, "ema.names", wrong, "exactly the names of the network's parameters")
        for name, average in self.shadow.items():
            average.copy_(state["shadow"][name])
        self.started = bool(state["started"])


def _master(parameter: nn.Parameter) -> Tensor:
    """A float32 copy, sharded as the parameter is."""
    return parameter.detach().to(torch.float32, copy=True)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
