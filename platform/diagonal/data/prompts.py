"""Prompts: one id for each, and the order in which training sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from diagonal.diffusion.noise import Salt, generator
from diagonal.model.text import clean_prompt

ID_RANGE = 2**64


def prompt_id(prompt: str) -> str:
    """A stable id: the first 16 hexadecimal digits of the cleaned prompt's sha256."""
    return hashlib.sha256(clean_prompt(prompt).encode()).hexdigest()[:16]


def is_held_out(identity: str, share: float) -> bool:
    """Whether the prompt of that id is kept from training: a function of the id alone, for about `share` of them."""
    return int(identity, 16) < share * ID_RANGE


class SeenIds:
    """A set of 64-bit ids in 8 bytes each: sorted runs, merged with those that are no longer."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add ids `[n]`; returns `[n]`, true for the first of each that was not in the set."""
        unique, first = np.unique(ids, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for run in self._runs:
            known |= run[np.minimum(np.searchsorted(run, unique), len(run) - 1)] == unique
        new, fresh = unique[~known], np.zeros(len(ids), dtype=bool)
        fresh[first[~known]] = True
        while len(new) and self._runs and len(self._runs[-1]) <= len(new):
            new = np.sort(np.concatenate((self._runs.pop(), new)))
        if len(new):
            self._runs.append(new)
        return fresh


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on (seed, epoch) alone."""
    return torch.randperm(count, generator=generator(seed, Salt.ORDER, epoch)).numpy()


class Order:
    """Which of `count` items each global sample number reads, epoch after epoch; holds one epoch's permutation."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, sample: int) -> int:
        epoch, place = divmod(sample, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._count, self._seed, epoch)
        return int(self._order[place])


def samples(count: int, seed: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(global sample number, index of the item it reads) for samples start to stop, epoch after epoch."""
    order = Order(count, seed)
    return ((sample, order[sample]) for sample in range(start, stop))
