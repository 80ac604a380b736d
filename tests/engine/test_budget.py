"""Admission in the engine: costs are measured while chunks are made, and decide who comes in, and in what order."""

from __future__ import annotations

import pytest
from torch import Tensor

from diagonal.engine.engine import BudgetError, CapacityError, Engine
from diagonal.engine.session import PromptChange
from diagonal.model.vae import DecoderState
from tests.engine.driving import OTHER, Clock, admitted, engine_of, pull, runner, spec_of, stream, timed
from tests.networks import small_release
from tests.recorded_metrics import RecordedMetrics

# A forward takes so long, and so much more for each session in it. A chunk of two steps alone: 2*(a + b) s.


def engine_at(
    forward_s: float, row_s: float, *settings: str, warm: bool = True
) -> tuple[Engine, Clock, RecordedMetrics]:
    clock, metrics = Clock(), RecordedMetrics()
    release = timed(small_release("serve.max_sessions=6", *settings), clock, forward_s, row_s)
    engine = engine_of(release=release, clock=clock, metrics=metrics)
    if warm:
        engine.warm_up()
    return engine, clock, metrics


@pytest.mark.slow
def test_the_warm_up_measures_every_kind_at_every_batch_size_and_leaves_no_trace() -> None:
    engine, clock, _ = engine_at(0.01, 0.02, warm=False)
    engine.warm_up()
    stats = engine.stats()
    assert (stats.active_sessions, stats.cache_bytes, stats.busy) == (0, 0, 0.0)
    before = clock.now_s
    engine.open(spec_of("a", frames=None))
    assert engine.stats().busy == pytest.approx(4 * 0.03 / 0.5625), "the first chunk: four forwards alone"
    for _ in range(5):
        pull(engine, "a")
    assert engine.stats().busy == pytest.approx(2 * 0.03 / 0.75), "then two, every 0.75 s"
    assert clock.now_s - before == pytest.approx(0.03 * (4 + 3 + 2 + 2 + 2))


def test_what_the_first_round_of_the_warm_up_costs_more_is_not_counted() -> None:
    clock, release, rows = Clock(), small_release("serve.max_sessions=2"), set[int]()

    def compile_once(module: object, inputs: list[Tensor], output: object) -> None:
        clock.now_s += 0.01 if len(inputs[0]) in rows else 30.0
        rows.add(len(inputs[0]))

    release.network.register_forward_hook(compile_once)  # type: ignore[arg-type]
    engine = engine_of(release=release, clock=clock)
    engine.warm_up()
    assert rows == {1, 2}
    engine.open(spec_of("a"))
    engine.open(spec_of("b"))
    assert engine.stats().busy == pytest.approx(4 * 0.01 / 0.5625)


@pytest.mark.slow
def test_sessions_that_batch_well_fit_in_greater_number_than_those_that_do_not() -> None:
    """First chunks: 4 forwards in 0.5625 s; a batch of four at 0.1 a forward is 0.71, one of five four and one: 1.42.
    At 0.025 a session and forward, without any gain: 0.18 each, so five fit (0.89)."""
    shared, _, _ = engine_at(0.1, 0.0)
    assert admitted(shared, "abcdef") == "abcd"
    alone, _, _ = engine_at(0.0, 0.025)
    assert admitted(alone, "abcdef") == "abcde"
    alone_slow, _, _ = engine_at(0.0, 0.1)
    assert admitted(alone_slow, "abcdef") == "a"


def test_a_smaller_share_admits_fewer() -> None:
    engine, _, _ = engine_at(0.0, 0.025, "serve.budget_share=0.5")
    assert admitted(engine, "abcdef") == "ab"


def test_sessions_past_their_first_chunks_leave_room_for_another() -> None:
    engine, _, _ = engine_at(0.0, 0.05)
    assert admitted(engine, "abc") == "ab"  # 0.36 each; 0.13 once they run
    for _ in range(3):
        for name in "ab":
            pull(engine, name)
    assert admitted(engine, "cd") == "c"  # 0.27 + 0.36


def test_a_refusal_says_when_and_is_right() -> None:
    engine, clock, _ = engine_at(0.0, 0.1)
    engine.open(spec_of("a", frames=9 + 12))
    with pytest.raises(BudgetError) as refused:
        engine.open(spec_of("b"))
    assert refused.value.retry_after_s == pytest.approx(21 / 16)
    pull(engine, "a")
    pull(engine, "a")
    engine.open(spec_of("b"))  # what a had to make is made


def test_an_empty_engine_takes_a_session_that_it_is_too_slow_for() -> None:
    engine, _, _ = engine_at(5.0, 0.0)
    assert admitted(engine, "ab") == "a"


def test_sessions_that_nobody_watches_are_limited_by_slots_alone_and_weigh_nothing() -> None:
    engine, _, _ = engine_at(0.0, 1.0)
    assert admitted(engine, "abcde", paced=False) == "abcde"
    assert engine.stats().busy == 0.0
    engine.close("e")
    engine.step()
    assert admitted(engine, "f") == "f" and admitted(engine, "x") == "" and engine.stats().busy > 7
    assert admitted(engine, "e", paced=False) == "e"
    with pytest.raises(CapacityError, match="all 6 session slots") as refused:
        engine.open(spec_of("g", paced=False))
    assert refused.value.reason == "full" and refused.value.retry_after_s >= 1.0


def test_the_first_slot_to_be_free_is_that_of_the_session_that_ends_first() -> None:
    engine, _, _ = engine_at(0.0, 0.001, "serve.max_sessions=2")
    engine.open(spec_of("a", frames=16 * 20))
    engine.open(spec_of("b", frames=16 * 8))
    with pytest.raises(CapacityError) as refused:
        engine.open(spec_of("c"))
    assert refused.value.retry_after_s == 8.0
    engine.close("a")
    with pytest.raises(CapacityError) as soon:
        engine.open(spec_of("c"))
    assert soon.value.retry_after_s == 1.0


def test_playing_sessions_go_before_what_nobody_waits_for() -> None:
    engine, _, _ = engine_at(0.0, 0.01)
    engine.open(spec_of("bg", paced=False))
    engine.open(spec_of("live"))
    order = []
    for _ in range(4):
        for name in ("bg", "live"):
            engine.request(name)
        order.append([result.session_id for result in engine.step()])
    assert order == [["live"]] * 4
    assert [result.session_id for result in engine.step()] == ["bg"], "the time that is left"


def test_a_batch_nobody_waits_for_takes_half_the_lead_while_others_play() -> None:
    engine, _, _ = engine_at(0.0, 0.06)  # first chunk: 0.24 each in a batch; lead 1.0
    for name in "abcd":
        engine.open(spec_of(name, paced=False))
        engine.request(name)
    assert len(engine.step()) == 4, "nobody plays"
    engine.open(spec_of("live"))
    for name in "abcd":
        engine.request(name)
    assert len(engine.step()) == 2, "second chunk: 0.18 each"


def test_a_recache_that_is_due_counts_against_the_slack() -> None:
    engine, clock, _ = engine_at(0.0, 0.05, "serve.batch_sessions=1")
    engine.open(spec_of("a", frames=None))
    engine.open(spec_of("b", frames=None, schedule="22"))  # its first chunk takes 0.1 s
    for _ in range(4):
        for name in "ab":
            pull(engine, name)
    for name in "ab":
        engine.request(name)
    engine.interact("b", PromptChange("e", OTHER))  # b has 0.1 s more slack; the re-cache takes 0.15 s
    assert [engine.step()[0].session_id for _ in range(2)] == ["b", "a"]


def test_recaches_are_measured_by_what_a_step_with_one_takes_longer() -> None:
    engine, _, metrics = engine_at(0.0, 0.05)
    assert engine.admission.cost.recache_s(3) == pytest.approx(0.15)
    stream(engine, spec_of("a", frames=None), 5)
    cost = engine.admission.cost.step_s
    before = [cost(kind, 1) for kind in {kind for kind, _ in engine.admission.cost._steps}]
    engine.interact("a", PromptChange("e", OTHER))
    pull(engine, "a")
    assert [cost(kind, 1) for kind in {kind for kind, _ in engine.admission.cost._steps}] == before
    assert engine.admission.cost.recache_s(3) == pytest.approx(0.15)
    assert engine.admission.cost.recaches_per_chunk == pytest.approx(0.02)
    assert metrics.total("diagonal_recaches_total") == 1


def test_a_step_that_rebuilds_a_decoder_tells_nothing_of_the_cost_of_a_recache() -> None:
    engine, clock, _ = engine_at(0.0, 0.05)
    stream(engine, spec_of("a", frames=None), 5)
    before = engine.admission.cost.recache_s(3)
    decode = runner(engine)._decoder.decode

    def slow(latents: Tensor, state: DecoderState) -> Tensor:
        clock.now_s += 5.0 if latents.shape[2] > 3 else 0.0
        return decode(latents, state)

    runner(engine)._decoder.decode = slow  # type: ignore[method-assign]
    engine.pause("a")
    engine.step()
    engine.resume("a")
    pull(engine, "a")
    assert engine.admission.cost.recache_s(3) == before
    assert engine.stats().busy == pytest.approx((0.1 + engine.admission.cost.recaches_per_chunk * before) / 0.75)


@pytest.mark.slow
def test_under_overload_a_new_session_may_run_the_shorter_schedule() -> None:
    never, _, _ = engine_at(0.0, 0.08)
    assert admitted(never, "ab") == "a"  # 0.57 each
    engine, _, metrics = engine_at(0.0, 0.08, "serve.degraded_steps=2", "serve.budget_share=0.95")
    assert admitted(engine, "abc") == "ab"  # 0.57 + 2 forwards of 0.08 in 0.5625 s
    assert (engine.info("a").steps, engine.info("a").shortened) == ("4322222", False)
    assert (engine.info("b").steps, engine.info("b").shortened) == ("2", True)
    assert metrics.total("diagonal_schedules_shortened_total") == 1
    assert pull(engine, "b").forwards == 2 and engine.snapshot("b").shortened


def test_a_schedule_that_was_asked_for_is_never_shortened() -> None:
    engine, _, _ = engine_at(0.0, 0.08, "serve.degraded_steps=2", "serve.budget_share=0.95")
    engine.open(spec_of("a"))
    with pytest.raises(BudgetError):
        engine.open(spec_of("b", schedule="4322222"))


def test_the_predicted_load_is_a_metric() -> None:
    engine, _, metrics = engine_at(0.0, 0.05)
    engine.open(spec_of("a"))
    assert metrics.last("diagonal_budget_used_ratio") == pytest.approx(4 * 0.05 / 0.5625)
