"""Overlap: a batch is decoded beside the next one's forwards, and nobody's chunks are others than without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.engine.chunk_maker import SessionError
from diagonal.engine.engine import Engine
from diagonal.engine.pipeline import DecodeStream, InFlightBatch, decode_streams
from diagonal.engine.session import ChunkResult, PromptChange, Session, SessionState
from diagonal.engine.snapshot import Snapshot
from diagonal.model.vae import Decoder, DecoderState
from tests.engine.driving import OTHER, BreakingDecoder, engine_of, equal, pull, spec_of, stream
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
    denoise, complete = engine.maker.denoise, engine.stepper._complete

    def denoising(batch: Sequence[Session]) -> Any:
        done.append(f"make {batch[0].spec.session_id}")
        return denoise(batch)

    def completing(batch: InFlightBatch) -> Any:
        done.append(f"show {batch.sessions[0].spec.session_id}")
        return complete(batch)

    engine.maker.denoise, engine.stepper._complete = denoising, completing  # type: ignore[method-assign]
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
    assert shown == [["a"], ["b"], ["c"]]
    plain = opened(frames=9)
    done = noted(plain)
    steps(plain)
    assert done == ["make a", "show a", "make b", "show b", "make c", "show c"]


def test_a_stream_alone_never_waits_for_another_step() -> None:
    engine = engine_of(BESIDE)
    assert equal(stream(engine, spec_of()), stream(engine_of(), spec_of())) and engine.stepper.in_flight == []


def test_sessions_that_are_closed_or_paused_under_way_are_so_when_their_chunk_is_out() -> None:
    engine = opened(BESIDE, frames=None)
    (first,) = engine.step()
    assert first.session_id == "a" and [f.sessions[0].spec.session_id for f in engine.stepper.in_flight] == ["b"]
    before = engine.snapshot("b")
    engine.pause("b")
    engine.close("a")
    assert before.next_chunk == 0 and engine.info("b").state is SessionState.RUNNING
    assert [result.session_id for result in (*engine.step(), *engine.step())] == [
        "b",
        "c",
    ] and engine.stepper.in_flight == []
    assert engine.info("b").state is SessionState.PAUSED and engine.snapshot("b").next_chunk == 1
    engine.resume("b")
    expected = opened(frames=None)
    for _ in NAMES:
        expected.step()
    assert equal([pull(engine, "b")], [pull(expected, "b")])


def test_one_that_is_closed_under_way_is_dropped_and_its_pages_come_back() -> None:
    engine = opened(BESIDE, frames=None)
    free = engine.maker.pool.free_pages
    engine.step()
    engine.close("b")
    assert {result.session_id for result in engine.step()} == {"c"}
    assert engine.maker.pool.free_pages == free - 2


def test_a_decoder_that_fails_ends_its_session_alone() -> None:
    release = small_release(ALONE, BESIDE)
    release.codec = BreakingDecoder(release.codec, 2)
    engine = engine_of(release=release)
    for name in NAMES:
        engine.open(spec_of(name, frames=9))
        engine.request(name)
    results = {result.session_id: result for step in steps(engine) for result in step}
    assert {name: result.code for name, result in results.items()} == {"a": None, "b": "decode_failed", "c": None}


def alone(*settings: str, chunks: int = 5, frames: int | None = 57, decoder: Decoder | None = None) -> Engine:
    """An engine with one session, all of whose chunks are asked for."""
    release = small_release(*settings)
    engine = engine_of(release=release if decoder is None else replace(release, codec=decoder))
    engine.open(spec_of("a", frames=frames, paced=False))
    engine.request("a", chunks - 1)
    return engine


def test_a_stream_alone_is_decoded_beside_its_next_forwards_chunk_by_chunk() -> None:
    engine = alone(BESIDE)
    done = noted(engine)
    results = [engine.step() for _ in range(5)]
    assert done == ["make a", *["make a", "show a"] * 4, "show a"]
    assert [len(made) for made in results] == [1] * 5 and engine.step() == [] and engine.stepper.in_flight == []
    plain = alone()
    assert equal([made[0] for made in results], [plain.step()[0] for _ in range(5)])


def test_what_comes_with_a_chunk_is_the_session_as_it_was_after_it() -> None:
    engine, expected = alone(BESIDE), stream(engine_of(), spec_of("a", frames=57, paced=False))
    for chunk in range(4):
        (result,) = engine.step()
        assert engine.stepper.in_flight and result.snapshot is not None and result.snapshot.next_chunk == chunk + 1
        if chunk < 3:  # nothing is evicted yet: bit-equal
            other = engine_of()
            other.restore(Snapshot.from_bytes(result.snapshot.to_bytes()))
            assert equal([pull(other, "a")], expected[chunk + 1 : chunk + 2])


@pytest.mark.parametrize("settings", [["serve.reanchor_every_chunks=2"], ["serve.reanchor_drift=0.001"]])
def test_a_stream_that_is_anchored_anew_is_the_same_with_it(settings: list[str]) -> None:
    one, other = alone(BESIDE, *settings, frames=81, chunks=7), alone(*settings, frames=81, chunks=7)
    chunks = [[engine.step()[0] for _ in range(7)] for engine in (one, other)]
    assert equal(*chunks) and chunks[0][-2].snapshot.reanchored == chunks[1][-2].snapshot.reanchored > 0  # type: ignore[union-attr]


def test_a_prompt_change_is_in_the_first_chunk_that_was_not_begun_when_it_came() -> None:
    engine, plain = alone(BESIDE), alone()
    made = list(engine.step())
    engine.interact("a", PromptChange("e", OTHER, 2))
    made += [engine.step()[0] for _ in range(4)]
    assert [result.applied_event_ids for result in made] == [(), (), ("e",), (), ()]
    expected = [plain.step()[0] for _ in range(2)]
    plain.interact("a", PromptChange("e", OTHER, 2))
    assert equal(made, [*expected, *(plain.step()[0] for _ in range(3))])


def test_a_stream_paused_during_a_chunk_stops_behind_it_and_resumes_unchanged() -> None:
    engine = alone(BESIDE)
    made = list(engine.step())
    engine.pause("a")
    assert engine.info("a").state is SessionState.RUNNING
    made += engine.step()
    assert engine.info("a").state is SessionState.PAUSED and engine.maker.pool.bytes_in_use == 0 and engine.step() == []
    engine.resume("a")
    made += engine.step()
    assert equal(made, [*stream(engine_of(), spec_of("a", frames=57))][:3])


class Spoiling(Decoder):
    """Pixels of the decode of that number are not finite, as the device finds."""

    def __init__(self, decoder: Decoder, number: int) -> None:
        self.decoder, self.number, self.calls = decoder, number, 0

    def start(self) -> DecoderState:
        return self.decoder.start()

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        pixels, self.calls = self.decoder.decode(latents, state), self.calls + 1
        state.finite = torch.tensor([self.calls != self.number])
        return pixels


@pytest.mark.parametrize(
    ("breaking", "code", "begun"), [(Spoiling, "not_finite", 3), (BreakingDecoder, "decode_failed", 2)]
)
def test_a_chunk_that_fails_drops_the_next_one_and_ends_its_session_alone(breaking: Any, code: str, begun: int) -> None:
    engine = alone(BESIDE, ALONE, decoder=breaking(small_release().codec, 2))
    whole, done = engine.maker.pool.free_pages, noted(engine)
    results = [*engine.step(), *engine.step()]
    assert [(result.chunk, result.code) for result in results] == [(0, None), (1, code)]
    assert done.count("make a") == begun and engine.step() == [] and engine.stepper.in_flight == []
    assert engine.maker.pool.free_pages == whole and engine.stats().active_sessions == 0
    assert equal(stream(engine, spec_of("b")), stream(engine_of(), spec_of("b")))


def test_forwards_that_fail_do_not_take_the_chunk_before_them_along(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = alone(BESIDE)
    denoise, whole = engine.maker.denoise, engine.maker.pool.free_pages

    def failing(batch: Sequence[Session]) -> Any:
        if batch[0].progress.making == 2:
            raise SessionError("forward_failed", "the network gave up")
        return denoise(batch)

    monkeypatch.setattr(engine.maker, "denoise", failing)
    results = [engine.step() for _ in range(3)]
    assert [(r.chunk, r.code) for made in results for r in made] == [(0, None), (1, None), (2, "forward_failed")]
    assert engine.step() == [] and engine.stepper.in_flight == [] and engine.maker.pool.free_pages == whole


def test_a_stream_that_is_closed_with_a_chunk_under_way_leaves_nothing() -> None:
    engine = alone(BESIDE, frames=None)
    whole = engine.maker.pool.free_pages
    engine.step()
    engine.close("a")
    assert engine.stepper.in_flight and engine.step() == [] and engine.stepper.in_flight == []
    assert engine.maker.pool.free_pages > whole - 1 and engine.stats().active_sessions == 0


def test_who_waits_for_a_first_chunk_goes_before_who_has_one_under_way() -> None:
    engine = alone(BESIDE, ALONE, frames=None)
    engine.step()
    engine.open(spec_of("b", frames=9))
    engine.request("b")
    done = noted(engine)
    assert [engine.step()[0].session_id for _ in range(3)] == ["a", "b", "a"]
    assert done[:4] == ["make b", "show a", "make a", "show b"]


class FakeStream:
    """Notes what is asked of a CUDA stream."""

    device = torch.device("cpu")

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def wait_stream(self, other: FakeStream) -> None:
        self.done.append(f"{self.name} waits for {other.name}")


def test_a_decode_stream_waits_for_the_current_stream_and_keeps_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    current, side, before = (FakeStream(name, done) for name in ("current", "side", "before"))

    @contextmanager
    def entered(stream: FakeStream) -> Any:
        done.append(f"into {stream.name}")
        yield
        done.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: done.append(f"{stream.name} reads"))
    stream = DecodeStream(side, before)  # type: ignore[arg-type]
    with stream.after([torch.zeros(1), torch.zeros(2)]):
        done.append("decode")
    with stream.inside():
        done.append("bring over")
    assert done == [
        "side waits for current",
        "side waits for before",
        "into side",
        "side reads",
        "side reads",
        "decode",
        "out of side",
        "into side",
        "bring over",
        "out of side",
    ]


def test_a_device_without_streams_has_one_stream_in_its_turn() -> None:
    for found in (decode_streams(torch.device("cpu"), True), decode_streams(torch.device("cuda"), False)):
        assert next(found) is next(found) and next(found)._stream is None
