"""Overlap: a batch is decoded beside the next one's forwards, and nobody's chunks are others than without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.engine.engine import Engine
from diagonal.engine.lanes import Lane, lanes
from diagonal.engine.session import ChunkResult, Session, SessionState
from tests.engine.driving import BreakingDecoder, engine_of, equal, pull, spec_of, stream
from tests.networks import small_release

ALONE = "serve.batch_sessions=1"
BESIDE = "serve.overlap_decode=true"
NAMES = ("a", "b", "c")


def opened(*settings: str, frames: int | None = 33) -> Engine:
    """An engine with three sessions that never share a forward, each of which asks for its first chunk."""
    engine = engine_of(ALONE, *settings)
    for seed, name in enumerate(NAMES):
        engine.open(spec_of(name, seed=seed, frames=frames))
        engine.request(name)
    return engine


def steps(engine: Engine) -> list[list[ChunkResult]]:
    """Step until nothing comes, asking for each session's next chunk when it has one."""
    found: list[list[ChunkResult]] = []
    while made := list(engine.step()):
        found.append(made)
        for result in made:
            if not result.last:
                engine.request(result.session_id)
    return found


def noted(engine: Engine) -> list[str]:
    """What is done from now on, in order: `make` and `show`, each with the session."""
    done: list[str] = []
    denoise, emit = engine._maker.denoise, engine._emit

    def denoising(batch: Sequence[Session]) -> Any:
        done.append(f"make {batch[0].spec.session_id}")
        return denoise(batch)

    def emitting(batch: Sequence[Session], chunk: Any, decoded: Any) -> Any:
        done.append(f"show {batch[0].spec.session_id}")
        return emit(batch, chunk, decoded)

    engine._maker.denoise, engine._emit = denoising, emitting  # type: ignore[method-assign,assignment]
    return done


def test_everybodys_chunks_are_those_without_it_and_come_in_order() -> None:
    made = {}
    for settings in ((), (BESIDE,)):
        results = [result for step in steps(opened(*settings)) for result in step]
        made[settings] = {name: [r for r in results if r.session_id == name] for name in NAMES}
    for name in NAMES:
        assert [r.chunk for r in made[BESIDE,][name]] == [0, 1, 2] and made[BESIDE,][name][-1].last
        assert equal(made[()][name], made[BESIDE,][name])


def test_a_chunk_is_shown_after_the_next_ones_forwards_were_given_to_the_device() -> None:
    engine = opened(BESIDE, frames=9)
    done = noted(engine)
    shown = [[result.session_id for result in step] for step in steps(engine)]
    assert done == ["make a", "make b", "show a", "make c", "show b", "show c"]
    assert shown == [["a"], ["b", "c"]]
    plain = opened(frames=9)
    done = noted(plain)
    steps(plain)
    assert done == ["make a", "show a", "make b", "show b", "make c", "show c"]


def test_a_stream_alone_never_waits_for_another_step() -> None:
    engine = engine_of(BESIDE)
    assert equal(stream(engine, spec_of()), stream(engine_of(), spec_of())) and engine._flights == []


def test_sessions_that_are_closed_or_paused_under_way_are_so_when_their_chunk_is_out() -> None:
    engine = opened(BESIDE, frames=None)
    (first,) = engine.step()
    assert first.session_id == "a" and [f.batch[0].spec.session_id for f in engine._flights] == ["b"]
    before = engine.snapshot("b")
    engine.pause("b")
    engine.close("a")
    assert before.next_chunk == 0 and engine.info("b").state is SessionState.RUNNING
    results = engine.step()
    assert {result.session_id for result in results} == {"b", "c"} and engine._flights == []
    assert engine.info("b").state is SessionState.PAUSED and engine.snapshot("b").next_chunk == 1
    engine.resume("b")
    expected = opened(frames=None)
    for _ in NAMES:
        expected.step()
    assert equal([pull(engine, "b")], [pull(expected, "b")])


def test_one_that_is_closed_under_way_is_dropped_and_its_pages_come_back() -> None:
    engine = opened(BESIDE, frames=None)
    free = engine._pool.free_pages
    engine.step()
    engine.close("b")
    assert {result.session_id for result in engine.step()} == {"c"}
    assert engine._pool.free_pages == free - 2


def test_a_decoder_that_fails_ends_its_session_alone() -> None:
    release = small_release(ALONE, BESIDE)
    release.codec = BreakingDecoder(release.codec, 2)
    engine = engine_of(release=release)
    for name in NAMES:
        engine.open(spec_of(name, frames=9))
        engine.request(name)
    results = {result.session_id: result for step in steps(engine) for result in step}
    assert {name: result.code for name, result in results.items()} == {"a": None, "b": "decode_failed", "c": None}


class FakeStream:
    """Notes what is asked of a CUDA stream."""

    device = torch.device("cpu")

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def wait_stream(self, other: FakeStream) -> None:
        self.done.append(f"{self.name} waits for {other.name}")


def test_a_lane_begins_behind_the_current_stream_keeps_what_it_reads_and_ends_behind_its_own_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    current, side = FakeStream("current", done), FakeStream("side", done)

    @contextmanager
    def entered(stream: FakeStream) -> Any:
        done.append(f"into {stream.name}")
        yield
        done.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: done.append(f"{stream.name} reads"))
    lane = Lane(side)  # type: ignore[arg-type]
    with lane.after([torch.zeros(1), torch.zeros(2)]):
        done.append("decode")
    with lane.inside():
        done.append("bring over")
    assert done == [
        "side waits for current", "into side", "side reads", "side reads", "decode", "out of side",
        "into side", "bring over", "out of side",
    ]


def test_a_device_without_streams_has_one_lane_in_its_turn() -> None:
    for found in (lanes(torch.device("cpu"), True), lanes(torch.device("cuda"), False)):
        assert next(found) is next(found) and next(found)._stream is None
