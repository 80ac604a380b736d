"""Replay: a recorded session once more, bit for bit, whatever happened to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diagonal.engine.engine import Engine
from diagonal.engine.recording import Recording
from diagonal.engine.replay import replay
from diagonal.engine.session import ChunkResult, PromptChange
from diagonal.engine.snapshot import Snapshot, SnapshotError
from diagonal.errors import FieldError
from tests.engine.driving import OTHER, PROMPT, Clock, engine_of, pull, spec_of, stream, timed
from tests.networks import SmallRelease, small_release

FRAMES = 3


def newest(engine: Engine, session_id: str = "s") -> Tensor:
    return engine.latents(session_id)[:, -FRAMES:]


def watched(engine: Engine, chunks: int, found: list[tuple[Tensor, ChunkResult]]) -> None:
    for _ in range(chunks):
        result = pull(engine)
        found.append((newest(engine), result))


def check(recording: Recording, found: list[tuple[Tensor, ChunkResult]], release: SmallRelease | None = None) -> None:
    """The replay, from the log as it is stored, has the same latents and pixels."""
    again = list(replay(release or small_release(), Recording.from_json(recording.to_json())))
    assert [chunk.chunk for chunk in again] == list(range(len(found)))
    for chunk, (latents, result) in zip(again, found, strict=True):
        assert torch.equal(chunk.clean, latents), f"chunk {chunk.chunk}"
        assert torch.equal(chunk.pixels, result.pixels), f"chunk {chunk.chunk}"


def test_a_stream_steered_paused_and_anchored_anew_is_replayed_bit_for_bit() -> None:
    engine, found = engine_of(), list[tuple[Tensor, ChunkResult]]()
    engine.open(spec_of(frames=None, record=True))
    watched(engine, 3, found)
    engine.interact("s", PromptChange("e1", "a"))
    engine.interact("s", PromptChange("e2", OTHER, 3))
    watched(engine, 2, found)
    engine.pause("s")
    engine.interact("s", PromptChange("e3", "a red square", 2))
    engine.step()
    engine.resume("s")
    watched(engine, 4, found)
    engine.reanchor("s")
    watched(engine, 2, found)
    recording = engine.recording("s")
    kinds = [(event.kind, event.chunk) for event in recording.events]
    assert kinds == [
        ("prompt", 3),
        ("recache", 3),
        ("recache", 4),
        ("pause", 5),
        ("resume", 5),
        ("prompt", 5),
        ("recache", 5),
        ("recache", 6),
        ("reanchor", 9),
        ("recache", 9),
    ]
    check(recording, found)


@pytest.mark.slow
def test_without_its_events_the_replay_is_another_stream() -> None:
    """So that the tests here can fail: each kind of event leaves its mark on the latents."""

    def marked(kind: str) -> bool:
        engine = engine_of()
        stream(engine, spec_of(frames=None, record=True), 7)
        if kind == "prompt":
            engine.interact("s", PromptChange("e", OTHER))
        elif kind == "reanchor":
            engine.reanchor("s")
        elif kind == "resume":
            engine.pause("s")
            engine.step()
            engine.resume("s")
        pull(engine)
        plain = engine.recording("s")
        bare = Recording(plain.identity, plain.spec, plain.schedule, plain.chunks, ())
        *_, last = replay(small_release(), bare)
        return not torch.equal(last.clean, newest(engine))

    assert [marked(kind) for kind in ("none", "prompt", "reanchor", "resume")] == [False, True, True, True]


def test_a_stream_that_moved_to_another_engine_is_replayed_over_the_seam() -> None:
    engine, found = engine_of(), list[tuple[Tensor, ChunkResult]]()
    engine.open(spec_of(frames=None, record=True))
    watched(engine, 6, found)
    elsewhere = engine_of()
    elsewhere.restore(Snapshot.from_bytes(engine.snapshot("s").to_bytes()))
    watched(elsewhere, 3, found)
    assert [event.kind for event in elsewhere.recording("s").events] == ["restore", "recache"]
    check(elsewhere.recording("s"), found)


def test_an_automatic_reanchor_is_replayed_from_the_log_and_not_decided_again() -> None:
    setting = "serve.reanchor_every_chunks=4"
    engine, found = engine_of(setting), list[tuple[Tensor, ChunkResult]]()
    engine.open(spec_of(frames=None, record=True))
    watched(engine, 10, found)
    recording = engine.recording("s")
    assert [(e.chunk, e.detail["cause"]) for e in recording.events if e.kind == "reanchor"] == [
        (4, "interval"),
        (8, "interval"),
    ]
    check(recording, found, small_release(setting))
    bare = Recording(recording.identity, recording.spec, recording.schedule, 6, ())
    plain = engine_of()
    stream(plain, spec_of(frames=None), 6)
    *_, last = replay(small_release(setting), bare)
    assert torch.equal(last.clean, newest(plain)), "what is not in the log does not happen"


def test_a_shortened_schedule_is_in_the_log_and_replayed() -> None:
    clock = Clock()
    settings = ("serve.degraded_steps=2", "serve.budget_share=0.95")
    engine = engine_of(release=timed(small_release(*settings), clock, 0.0, 0.08), clock=clock)
    engine.warm_up()
    engine.open(spec_of("other"))
    found: list[tuple[Tensor, ChunkResult]] = []
    engine.open(spec_of(record=True))
    watched(engine, 3, found)
    recording = engine.recording("s")
    assert recording.events[0].kind == "schedule" and recording.events[0].detail["steps"] == "2"
    assert [result.forwards for _, result in found] == [2, 2, 2]
    check(recording, found, small_release(*settings))


def test_a_session_made_in_a_batch_is_replayed_alone_within_rounding() -> None:
    """Largest difference of latents of about 1: 1e-6 here after 6 chunks in a batch of three, stated at 1e-5."""
    engine = engine_of()
    for seed in range(3):
        engine.open(spec_of(str(seed), seed=seed, record=True))
    found: list[list[Tensor]] = [[], [], []]
    for _ in range(6):
        for seed in range(3):
            engine.request(str(seed))
        assert len(engine.step()) == 3
        for seed in range(3):
            found[seed].append(newest(engine, str(seed)))
    worst = 0.0
    for seed in range(3):
        for chunk in replay(small_release(), engine.recording(str(seed))):
            worst = max(worst, float((chunk.clean - found[seed][chunk.chunk]).abs().max()))
    assert worst < 1e-5 and float(found[0][-1].std()) > 0.3, worst


def test_only_who_asked_for_a_recording_has_one_and_nothing_of_it_is_kept_for_others() -> None:
    engine = engine_of()
    stream(engine, spec_of(), 2)
    engine.interact("s", PromptChange("e1", OTHER))
    pull(engine)
    with pytest.raises(FieldError, match="session = 's': allowed is a session that was opened with record"):
        engine.recording("s")
    assert engine.table.sessions["s"].events == [] and engine.snapshot("s").events is None
    with pytest.raises(KeyError):
        engine.recording("x")


def test_events_of_a_chunk_that_was_not_made_are_not_in_the_recording() -> None:
    engine = engine_of()
    stream(engine, spec_of(record=True), 2)
    engine.pause("s")
    engine.step()
    assert engine.recording("s").events == () and engine.recording("s").chunks == 2


def test_another_release_and_a_broken_log_are_refused() -> None:
    engine = engine_of()
    stream(engine, spec_of(record=True), 1)
    recording = engine.recording("s")
    other = small_release()
    other.name = "other"
    with pytest.raises(SnapshotError, match="recording.identity.release = 'small': allowed is this engine's, 'other'"):
        next(replay(other, recording))
    for text in (
        "",
        "{}",
        recording.to_json()[:-3],
        recording.to_json().replace('"schema": 1', '"schema": 7'),
        recording.to_json().replace(PROMPT, " "),
    ):
        with pytest.raises(SnapshotError, match="recording"):
            Recording.from_json(text)
