"""Counts the bytes of tensors that live, by storage: what an update really holds, with real or with fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, `now` is the bytes of all storages that were made and still live, `peak` the most since it was set."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._stored: dict[int, tuple[int, Any]] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._note(tensor)
        self.start = self.peak = self.now

    def peak_since_start(self) -> int:
        """The most bytes beyond what was known at the start; begins a new peak."""
        peak, self.peak = self.peak - self.start, self.now
        return peak

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._stored:
            return

        def freed(_: Any) -> None:
            self.now -= self._stored.pop(key)[0]

        self._stored[key] = storage.nbytes(), weakref.ref(storage, freed)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return given
