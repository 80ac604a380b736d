"""A network of the shape that the training code meets: a root, repeated blocks, and parts that stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Modulates, mixes and adds; `seen` keeps the time it was given and the dtypes it computed in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) * 0.1)
        self.mix = nn.Linear(width, width)
        self.seen: list[tuple[Tensor, torch.dtype, torch.dtype]] = []

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        self.seen.append((time.detach().clone(), self.mix.weight.dtype, self.scale_shift_table.dtype))
        scale, shift = self.scale_shift_table.float().unbind(0)
        modulated = (hidden.float() * (1.0 + scale + time / 1000.0) + shift).type_as(hidden)
        return hidden + torch.tanh(self.mix(modulated))


class Network(nn.Module):
    """`[b, n]` and a level `[b, 1]` to `[b, n]` in float32."""

    _keep_in_fp32_modules = ["scale_shift_table"]

    def __init__(self, width: int = 6, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inward = nn.Linear(width, width)
            self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
            self.outward = nn.Linear(width, width)

    def block(self, index: int) -> Block:
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        hidden = self.inward(x.to(self.inward.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden, 1000.0 * level)
        return self.outward(hidden).float()


def batch(rows: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rollout(network: nn.Module, noise: Tensor, chunks: int = 3) -> Tensor:
    """Chunks that follow one another: each a forward without gradient, then one with, given the last chunk detached."""
    outputs, context = [], torch.zeros_like(noise)
    for chunk in range(chunks):
        start = noise * (1.0 + chunk) + context
        with torch.no_grad():
            middle = network(start, torch.ones(len(noise), 1))
        outputs.append(network(middle, torch.full((len(noise), 1), 0.9375)))
        context = outputs[-1].detach()
    return torch.stack(outputs, dim=1)
