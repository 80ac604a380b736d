"""Host syncs: a chunk's forwards and its decoding never wait for the device; a step brings its batch over at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diagonal.engine.model_runner import ModelRunner
from tests.engine.driving import engine_of, spec_of
from tests.networks import small_release

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


class Reads(TorchDispatchMode):
    """Operations that end in a number on the host, or in a shape that depends on one."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "unique2", "masked_select"):
            self._seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is read of tensors from here on."""
    seen: list[str] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return real(tensor, *arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch, Reads(seen):
        for name in READS:
            patch.setattr(Tensor, name, noting(name, getattr(Tensor, name)))
        yield seen


@pytest.mark.parametrize("settings", [(), ("serve.cache_dtype=fp8",), ("schedule.context=0.0",)])
def test_neither_forwards_nor_decoding_read_a_number_from_the_device(settings: tuple[str, ...]) -> None:
    release = small_release(*settings)
    maker = ModelRunner(release, "cpu", 2)
    sessions = [maker.new_session(spec_of(name, seed=seed), release.config.schedule) for seed, name in enumerate("ab")]
    for session in sessions:
        maker.prepare(session)
    for _ in range(2):  # without context, then with it
        with torch.no_grad(), watched() as seen:
            done = maker.denoise(sessions)
            maker.draw_ahead(sessions)
            maker.decode(sessions, list(done.clean))
        assert seen == []
        for session in sessions:
            session.progress.in_flight += 1
            session.cache.begin(session.progress.making)


def test_a_step_of_two_sessions_brings_their_chunks_over_in_one_transfer() -> None:
    engine = engine_of()
    for name in "ab":
        engine.open(spec_of(name))
        engine.request(name)
    with watched() as seen:
        results = engine.step()
    assert len(results) == 2 and seen.count("cpu") == 1
