"""The engine: exact counts, prompt changes at the next chunk, slots, order and batches."""

from __future__ import annotations

import pytest
import torch

from diagonal.diffusion.rollout import rollout
from diagonal.engine.engine import CapacityError
from diagonal.engine.session import ChunkResult, PromptChange
from diagonal.engine.specs import Timeline
from diagonal.errors import FieldError
from diagonal.model.vae import decoder_of
from tests.engine.driving import (
    CLEANER,
    OTHER,
    PROMPT,
    Clock,
    engine_of,
    equal,
    meanwhile,
    pull,
    runner,
    spec_of,
    stream,
)
from tests.networks import SmallRelease, small_release, small_vae
from tests.recorded_metrics import RecordedMetrics

# What comes out


@pytest.mark.parametrize(("frames", "chunks"), [(1, 1), (9, 1), (10, 2), (81, 7), (82, 8)])
def test_any_number_of_frames_comes_out_exactly(frames: int, chunks: int) -> None:
    engine = engine_of(metrics=(metrics := RecordedMetrics()))
    results = stream(engine, spec_of(frames=frames))
    assert [result.chunk for result in results] == list(range(chunks))
    assert [result.last for result in results] == [False] * (chunks - 1) + [True]
    assert sum(len(result.pixels) for result in results) == frames == metrics.total("diagonal_frames_generated_total")
    assert [result.first_pixel_frame for result in results] == [0, 9, 21, 33, 45, 57, 69, 81][:chunks]
    assert all(r.pixels.shape[1:] == (32, 48, 3) and r.pixels.dtype == torch.uint8 for r in results)
    engine.request("s")
    assert engine.step() == [], "a session that is done makes nothing more"


def test_surplus_frames_are_dropped_from_the_end_of_the_last_chunk() -> None:
    short, long = stream(engine_of(), spec_of(frames=10)), stream(engine_of(), spec_of(frames=21))
    assert torch.equal(short[0].pixels, long[0].pixels)
    assert len(short[1].pixels) == 1 and torch.equal(short[1].pixels, long[1].pixels[:1])


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["linear", "wan"])
def test_a_stream_is_the_rollout_of_its_seed_decoded(codec: str) -> None:
    release = small_release()
    if codec == "wan":
        release.codec = decoder_of(small_vae())
    results = stream(engine_of(release=release), spec_of())
    clean = rollout(release.network, release.config, release.encoder.encode([PROMPT]), [3]).clean
    assert torch.equal(torch.cat([result.pixels for result in results]), release.codec.decode_clip(clean)[0])
    assert sum(result.forwards for result in results) == 17


def test_a_stream_with_a_cleaner_context_is_its_rollout_too() -> None:
    release = small_release(*CLEANER)
    alone = stream(engine_of(release=release), spec_of())
    clean = rollout(release.network, release.config, release.encoder.encode([PROMPT]), [3]).clean
    assert torch.equal(torch.cat([result.pixels for result in alone]), release.codec.decode_clip(clean)[0])
    assert sum(result.forwards for result in alone) == 17 + 1 + 6


def test_a_chunk_made_again_on_a_fresh_engine_is_bit_equal() -> None:
    first = stream(engine_of(), spec_of())
    assert equal(stream(engine_of(), spec_of()), first)
    assert not equal(stream(engine_of(), spec_of(seed=4)), first)
    assert not equal(stream(engine_of(), spec_of(prompt=OTHER)), first)


def test_noise_that_was_drawn_ahead_is_the_same_noise() -> None:
    engine, plain = engine_of(), stream(engine_of(), spec_of(), 3)
    found = stream(engine, spec_of(), 1)
    session, maker = engine.table["s"], runner(engine)
    session.progress.next_chunk -= 1  # as it stands when the chunk before is emitted
    maker.draw_ahead([session])
    session.progress.next_chunk += 1
    assert set(maker._drawn) == {(3, 1)}
    maker._drawn[3, 1] = maker._drawn[3, 1].clone()
    assert equal([*found, pull(engine), pull(engine)], plain)
    maker._drawn = {(3, 3): torch.zeros(engine.geometry.chunk_shape()[1:])}
    assert not equal([pull(engine)], stream(engine_of(), spec_of(), 4)[3:]), "and it is what is taken"


def test_an_endless_stream_goes_on_in_the_memory_of_its_window() -> None:
    engine = engine_of()
    results = stream(engine, spec_of(frames=None), 12)
    assert len(results) == 12 and not results[-1].last and len(results[-1].pixels) == 12
    assert engine.stats().cache_bytes == engine.stats().cache_capacity_bytes // 4


def test_a_session_may_run_another_schedule_under_the_releases_own_context() -> None:
    assert [r.forwards for r in stream(engine_of(), spec_of(schedule="32"), 3)] == [3, 2, 2]
    level = engine_of("schedule.context=0.1")
    assert [r.forwards for r in stream(level, spec_of(schedule="32"), 3)] == [4, 3, 3]
    assert [r.forwards for r in stream(level, spec_of("t", schedule="1"), 2)] == [2, 2]
    with pytest.raises(FieldError, match="schedule.context"):
        engine_of().open(spec_of(schedule="1"))
    with pytest.raises(FieldError, match="schedule.steps = '9'"):
        engine_of().open(spec_of(schedule="9"))


# Prompt changes


def test_a_prompt_change_applies_at_the_next_chunk_and_is_reported_there_once() -> None:
    plain, engine = stream(engine_of(), spec_of()), engine_of(metrics=(metrics := RecordedMetrics()))
    changed = stream(engine, spec_of(), 3)
    engine.interact("s", PromptChange("e1", OTHER))
    changed += [pull(engine) for _ in range(4)]
    assert [result.applied_event_ids for result in changed] == [(), (), (), ("e1",), (), (), ()]
    assert equal(changed[:3], plain[:3])
    assert all(not torch.equal(a.pixels, b.pixels) for a, b in zip(changed[3:], plain[3:], strict=True))
    assert changed[3].forwards == 2 and metrics.total("diagonal_model_forward_calls_total") == 17 + 3


def test_a_change_to_the_same_prompt_changes_no_pixel_before_the_first_eviction() -> None:
    plain, engine = stream(engine_of(), spec_of()), engine_of()
    changed = stream(engine, spec_of(), 2)
    engine.interact("s", PromptChange("e1", PROMPT))
    changed += [pull(engine) for _ in range(2)]
    assert changed[2].applied_event_ids == ("e1",) and equal(changed, plain[:4])


def test_of_several_changes_before_a_chunk_the_last_holds_and_all_are_reported() -> None:
    engine, direct = engine_of(), engine_of()
    stream(engine, spec_of(), 1)
    stream(direct, spec_of(), 1)
    for number, prompt in enumerate(("a", "a blue circle", OTHER)):
        engine.interact("s", PromptChange(f"e{number}", prompt))
    direct.interact("s", PromptChange("e", OTHER))
    result = pull(engine)
    assert result.applied_event_ids == ("e0", "e1", "e2")
    assert torch.equal(result.pixels, pull(direct).pixels)


def test_a_change_before_the_first_chunk_is_in_it() -> None:
    engine = engine_of()
    engine.open(spec_of())
    engine.interact("s", PromptChange("e1", OTHER))
    first = pull(engine)
    assert first.applied_event_ids == ("e1",)
    assert torch.equal(first.pixels, stream(engine_of(), spec_of(prompt=OTHER), 1)[0].pixels)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_transition_takes_so_many_chunks_with_a_recache_at_each(chunks: int) -> None:
    engine = engine_of()
    stream(engine, spec_of(record=True), 2)
    engine.interact("s", PromptChange("e1", OTHER, chunks))
    total = max(1, chunks)
    for done in range(1, total + 2):
        pull(engine)
        timeline = engine.snapshot("s").timeline
        assert (timeline.done, timeline.total) == ((done, total) if done < total else (0, 0))
        assert timeline.target == (OTHER if done < total else None)
    assert timeline == Timeline.of(OTHER)
    events = engine.recording("s").events
    assert [event.chunk for event in events if event.kind == "recache"] == list(range(2, 2 + total))
    (prompt,) = [event for event in events if event.kind == "prompt"]
    assert (prompt.chunk, prompt.detail["prompt"], prompt.detail["transition_chunks"]) == (2, OTHER, chunks)


# Slots


def test_no_more_sessions_are_taken_than_there_are_slots_and_the_error_says_when_to_ask() -> None:
    engine = engine_of("serve.max_sessions=2")
    for name in ("a", "b"):
        engine.open(spec_of(name))
    with pytest.raises(CapacityError, match="all 2 session slots") as full:
        engine.open(spec_of("c"))
    assert full.value.retry_after_s >= 1.0
    assert engine.stats().free_slots == 0
    engine.close("a")
    engine.step()
    engine.open(spec_of("c"))


def test_an_id_in_use_is_refused_and_one_that_is_free_again_is_taken() -> None:
    engine = engine_of()
    engine.open(spec_of())
    with pytest.raises(FieldError, match="session_id = 's': allowed is an id that is not in use"):
        engine.open(spec_of())
    engine.close("s")
    engine.step()
    engine.open(spec_of())


def test_an_unknown_session_is_a_key_error_and_closing_it_is_nothing() -> None:
    engine = engine_of()
    for call in (
        lambda: engine.request("x"),
        lambda: engine.interact("x", PromptChange("e", "a")),
        lambda: engine.snapshot("x"),
    ):
        with pytest.raises(KeyError):
            call()
    engine.close("x")
    assert engine.step() == []


def test_closing_frees_the_cache_within_one_step_and_leaves_the_others_alone() -> None:
    engine = engine_of(metrics=(metrics := RecordedMetrics()))
    alone = stream(engine_of(), spec_of("b"), 4)
    stream(engine, spec_of("a"), 3)
    others = stream(engine, spec_of("b"), 3)
    both, page = engine.stats().cache_bytes, engine.stats().cache_capacity_bytes // 16
    engine.close("a")
    assert both == 6 * page
    assert equal([*others, pull(engine, "b")], alone)
    assert engine.stats().cache_bytes == 4 * page == metrics.last("diagonal_kv_cache_bytes")
    engine.close("b")
    engine.step()
    stats = engine.stats()
    assert (stats.active_sessions, stats.free_slots, stats.cache_bytes) == (0, 4, 0)
    assert metrics.last("diagonal_kv_cache_bytes") == metrics.last("diagonal_sessions_active") == 0


def test_the_caches_gauge_is_its_formula_to_the_byte_and_the_pool_bounds_it() -> None:
    """2 * layers * heads * head_dim * element size, for each token of the window."""
    engine = engine_of("cache.window_frames=9", metrics=(metrics := RecordedMetrics()))
    layout, tokens = runner(engine)._network.config, engine.geometry.frame_tokens
    frame = 2 * layout.num_layers * layout.num_attention_heads * layout.attention_head_dim * 4 * tokens
    for name in "abcd":
        engine.open(spec_of(name, frames=None, seed=ord(name)))
    for chunk in range(5):
        for name in "abcd":
            engine.request(name)
        assert len(engine.step()) == 4
        window = min(9, 3 * (chunk + 1))
        assert metrics.last("diagonal_kv_cache_bytes") == 4 * window * frame
        assert engine.info("a").cache_bytes == window * frame
    assert metrics.last("diagonal_kv_cache_bytes") == metrics.last("diagonal_kv_cache_capacity_bytes")


def test_a_slot_is_free_within_the_chunk_in_which_its_session_is_closed() -> None:
    engine = engine_of("serve.max_sessions=2")
    for name in "ab":
        stream(engine, spec_of(name, seed=ord(name)), 2)
    meanwhile(engine, lambda: engine.close("b"))
    for name in "ab":
        engine.request(name)
    assert [result.session_id for result in engine.step()] == ["a"], "nobody waits for b's chunk any more"
    assert engine.stats().free_slots == 1 and engine.stats().cache_bytes == engine.info("a").cache_bytes
    engine.open(spec_of("c"))


def test_a_session_closed_before_its_first_chunk_leaves_nothing() -> None:
    engine = engine_of()
    engine.open(spec_of())
    engine.request("s")
    engine.close("s")
    assert engine.step() == [] and engine.stats().active_sessions == 0


def test_a_done_session_holds_its_slot_until_it_is_closed() -> None:
    engine = engine_of()
    stream(engine, spec_of(frames=9))
    assert engine.stats().active_sessions == 1
    engine.close("s")
    engine.step()
    assert engine.stats().cache_bytes == engine.stats().active_sessions == 0


# Order and batches


def test_the_session_with_the_least_slack_goes_first() -> None:
    clock = Clock()
    engine = engine_of("serve.batch_sessions=1", clock=clock)
    order = []
    for name in ("a", "b"):
        engine.open(spec_of(name))
    for _ in range(7):
        for name in ("a", "b"):
            engine.request(name)
        (result,) = engine.step()
        order.append((result.session_id, result.chunk))
        clock.now_s += 0.1 if len(order) < 3 else 0.0
    # Both new: by name. Then b, as it has shown nothing. a began first, so it runs dry first; then they take turns.
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)]


def test_a_viewer_who_waited_plays_on_from_the_chunk_that_came_late() -> None:
    """What a stall took is not owed for ever: the session is as urgent again as one that never stalled."""
    clock, metrics = Clock(), RecordedMetrics()
    engine = engine_of(clock=clock, metrics=metrics)
    engine.open(spec_of(frames=None))
    ahead = []
    for wait_s in (0.0, 10.0, 0.25):
        clock.now_s += wait_s
        engine.request("s")
        engine.step()
        ahead.append(engine.info("s").ahead_s)
    assert ahead == [9 / 16, 12 / 16, 24 / 16 - 0.25]
    assert metrics.values("diagonal_playout_slack_seconds") == [0.0, 0.5]


def test_only_sessions_that_asked_are_served() -> None:
    engine = engine_of()
    for name in ("a", "b"):
        engine.open(spec_of(name))
    engine.request("b")
    assert [result.session_id for result in engine.step()] == ["b"] and engine.step() == []


def rows_of(release: SmallRelease) -> list[int]:
    """The batch size of every forward from now on."""
    rows: list[int] = []
    release.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    return rows


def test_sessions_at_the_same_place_share_their_forwards() -> None:
    """Pixels of a batch are within 1 of 255 of those of a session alone."""
    release = small_release()
    rows, engine = rows_of(release), engine_of(release=release)
    for seed in range(3):
        engine.open(spec_of(str(seed), seed=seed))
    batched: list[list[ChunkResult]] = []
    for _ in range(6):
        for seed in range(3):
            engine.request(str(seed))
        batched.append(engine.step())
    assert rows == [3] * (4 + 3 + 2 * 4)
    for seed in range(3):
        for step, expected in enumerate(stream(engine_of(), spec_of(str(seed), seed=seed), 6)):
            assert (batched[step][seed].pixels.int() - expected.pixels.int()).abs().max() <= 1
            assert batched[step][seed].forwards == expected.forwards


def test_sessions_far_apart_share_a_forward_once_both_windows_are_full() -> None:
    release = small_release()
    engine, alone = engine_of(release=release), engine_of()
    stream(engine, spec_of("a"), 5)
    stream(engine, spec_of("b", seed=8), 3)
    expected = stream(alone, spec_of("a"), 6)[5], stream(alone, spec_of("b", seed=8), 4)[3]
    rows = rows_of(release)
    for name in ("a", "b"):
        engine.request(name)
    found = engine.step()
    assert rows == [2, 2] and sorted(result.chunk for result in found) == [3, 5]
    for result in found:
        other = expected[0] if result.session_id == "a" else expected[1]
        assert (result.pixels.int() - other.pixels.int()).abs().max() <= 1


def test_sessions_with_other_rows_or_another_length_of_context_do_not_share_a_forward() -> None:
    release = small_release()
    engine = engine_of(release=release)
    stream(engine, spec_of("a"), 2)
    stream(engine, spec_of("b"), 4)
    engine.open(spec_of("c"))
    engine.open(spec_of("d", schedule="5"))
    rows = rows_of(release)
    for name in "abcd":
        engine.request(name)
    served = [[result.session_id for result in engine.step()] for _ in range(4)]
    assert sorted(served) == [["a"], ["b"], ["c"], ["d"]] and set(rows) == {1}
