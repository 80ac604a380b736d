"""Streams without end: constant memory, bounded positions, drift as a metric without a session's name, new anchors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagonal.engine.drift import MEASURES
from diagonal.engine.engine import Engine
from diagonal.engine.session import PromptChange
from diagonal.engine.snapshot import Snapshot
from diagonal.model import dit
from diagonal.model.vae import decoder_of
from tests.engine.driving import OTHER, engine_of, equal, pull, spec_of, stream
from tests.networks import small_release, small_vae
from tests.recorded_metrics import RecordedMetrics


def held(engine: Engine) -> tuple[int, ...]:
    """Bytes of all that a session keeps, and the lengths of its lists."""
    info, session = engine.info("s"), engine.table.sessions["s"]
    lists = (
        len(session.events),
        len(session.prompt.pending),
        len(session.latents.window),
        len(session.prompt.timeline.blends),
    )
    return info.cache_bytes, info.decoder_bytes, info.latents_bytes, engine.maker.pool.bytes_in_use, *lists


@pytest.mark.slow
def test_two_hundred_chunks_take_the_memory_of_ten_and_positions_stay_within_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positions: list[int] = []
    rotary_table = dit.rotary_table

    def noted(rope: Any, frames: int, *grid: int) -> Any:
        positions.append(frames)
        return rotary_table(rope, frames, *grid)

    monkeypatch.setattr(dit, "rotary_table", noted)
    engine = engine_of(metrics=(metrics := RecordedMetrics()))
    stream(engine, spec_of(frames=None), 10)
    after_ten, sent = held(engine), len(engine.snapshot("s").to_bytes())
    for chunk in range(10, 200):
        if chunk % 20 == 0:
            engine.interact("s", PromptChange(f"e{chunk}", OTHER, 2))
        result = pull(engine)
        assert not result.last and result.first_pixel_frame == 12 * chunk - 3
    assert result.chunk == 199 and bool(result.pixels.float().std() > 1)
    assert held(engine) == after_ten
    assert abs(len(engine.snapshot("s").to_bytes()) - sent) < 100
    assert max(positions) == engine.config.cache.window_frames == 12
    drift = metrics.labels("diagonal_stream_drift_ratio")
    assert {labels["measure"] for labels in drift} == set(MEASURES) and all(set(d) == {"measure"} for d in drift)


@pytest.mark.slow
def test_a_video_codecs_decoder_keeps_no_more_after_twenty_chunks_than_after_nine() -> None:
    release = small_release()
    release.codec = decoder_of(small_vae())
    engine = engine_of(release=release)
    stream(engine, spec_of(frames=None), 9)
    after_nine = held(engine)
    for _ in range(11):
        pull(engine)
    assert held(engine) == after_nine and after_nine[1] > 0


def test_a_new_anchor_leaves_sink_and_newest_chunk_and_the_window_fills_again() -> None:
    engine = engine_of(metrics=(metrics := RecordedMetrics()))
    plain = stream(engine_of(), spec_of(frames=None), 9)
    found = stream(engine, spec_of(frames=None), 7)
    engine.reanchor("s")
    windows = []
    for _ in range(3):
        found.append(pull(engine))
        windows.append(engine.table.sessions["s"].cache.chunks)
    assert windows == [(0, 6, 7), (0, 6, 7, 8), (0, 7, 8, 9)]
    assert equal(found[:7], plain[:7]) and not torch.equal(found[7].pixels, plain[7].pixels)
    assert metrics.total("diagonal_recaches_total") == 1


def test_a_new_anchor_where_there_is_nothing_to_drop_changes_nothing() -> None:
    engine, plain = engine_of(metrics=(metrics := RecordedMetrics())), stream(engine_of(), spec_of(), 4)
    found = stream(engine, spec_of(), 2)
    engine.reanchor("s")
    found += [pull(engine), pull(engine)]
    assert equal(found, plain) and not metrics.of("diagonal_recaches_total")


def test_a_stream_is_anchored_anew_every_so_many_chunks_where_that_is_configured() -> None:
    engine = engine_of("serve.reanchor_every_chunks=6")
    stream(engine, spec_of(frames=None, record=True), 20)
    assert [event.chunk for event in engine.recording("s").events if event.kind == "reanchor"] == [6, 12, 18]


def test_a_stream_that_drifted_is_anchored_anew_and_that_is_known_after_a_move() -> None:
    engine = engine_of("serve.reanchor_drift=0.02")
    stream(engine, spec_of(frames=None, record=True), 30)
    chunks = [event.chunk for event in engine.recording("s").events if event.kind == "reanchor"]
    assert chunks and min(b - a for a, b in zip([0, *chunks], chunks, strict=False)) >= 4
    elsewhere = engine_of("serve.reanchor_drift=0.02")
    elsewhere.restore(Snapshot.from_bytes(engine.snapshot("s").to_bytes()))
    assert elsewhere.table.sessions["s"].rebuild.reanchored == engine.table.sessions["s"].rebuild.reanchored
    assert elsewhere.info("s").drift == engine.info("s").drift != {}


def test_a_prompt_change_is_no_drift() -> None:
    engine = engine_of()
    stream(engine, spec_of(frames=None), 8)
    assert engine.info("s").drift
    engine.interact("s", PromptChange("e", OTHER))
    pull(engine)
    assert engine.info("s").drift == {}
