"""Admission: hand-worked budgets, and laws that hold for any costs and any sessions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagonal.engine.budget import (
    Budget,
    BudgetError,
    ChunkKind,
    CostModel,
    Demand,
    Progress,
    bounded_s,
    busy_share,
    demand_of,
    first_stable_chunk,
)
from diagonal.errors import FieldError
from diagonal.geometry import ChunkGeometry
from diagonal.schedule import StepSchedule

GEOMETRY = ChunkGeometry()
STEADY = ChunkKind(2, 3)
WINDOW = 4


def model_of(**steps: float) -> CostModel:
    """Costs of the steady chunk by batch size: `model_of(b1=0.3, b2=0.4)`."""
    model = CostModel()
    for name, seconds in steps.items():
        model.observe(STEADY, int(name[1:]), seconds)
    return model


def playing(count: int, key: str = "k", **fields: float) -> list[Demand]:
    return [Demand(key, STEADY, 0.75, **fields)] * count  # type: ignore[arg-type]


# What a step costs


def test_the_first_measurement_counts_whole_and_later_ones_by_a_fifth() -> None:
    model = model_of(b1=0.3)
    assert model.step_s(STEADY, 1) == 0.3
    model.observe(STEADY, 1, 0.8)
    assert model.step_s(STEADY, 1) == pytest.approx(0.4)
    with pytest.raises(FieldError, match="smoothing = 0"):
        CostModel(0)


def test_what_was_not_measured_is_never_guessed_too_cheap() -> None:
    model = model_of(b1=0.3, b4=0.8)
    assert model.step_s(STEADY, 2) == pytest.approx(0.6), "two, one after the other; cheaper than four"
    assert model.step_s(STEADY, 3) == pytest.approx(0.8), "no more than four at once"
    assert model.step_s(STEADY, 8) == pytest.approx(1.6), "twice four"
    model.observe(ChunkKind(1, 1), 1, 0.2)
    assert model.step_s(ChunkKind(4, 0), 1) == pytest.approx(4 * 0.2), "so many forwards of the dearest known kind"
    assert CostModel().step_s(STEADY, 1) == 0.0


def test_recaches_are_averaged_by_chunk_and_by_how_often_they_happen() -> None:
    model = CostModel()
    assert model.recache_s(3) == model.recaches_per_chunk == 0.0
    model.observe_recache(3, 0.3)
    assert model.recache_s(2) == pytest.approx(0.2)
    model.observe_chunk(True, smoothing=0.5)
    model.observe_chunk(False, smoothing=0.5)
    assert model.recaches_per_chunk == 0.25


# What sessions need


def test_a_stream_settles_when_its_window_is_full_and_its_row_repeats() -> None:
    found = [
        first_stable_chunk(StepSchedule(steps), WINDOW) for steps in ("4322222", "2", "3333333", "222223", "43333332")
    ]
    assert found == [3, 3, 3, 5, 7]
    assert first_stable_chunk(StepSchedule("2"), 1) == 1


def test_busy_time_is_that_of_full_batches_and_the_rest_over_the_period_of_a_chunk() -> None:
    model = model_of(b1=0.3, b2=0.4, b3=0.45)
    assert busy_share(model, [], 2) == 0.0
    assert busy_share(model, playing(1), 2) == pytest.approx(0.3 / 0.75)
    assert busy_share(model, playing(2), 2) == pytest.approx(0.4 / 0.75), "two of one key cost less than two"
    assert busy_share(model, playing(5), 2) == pytest.approx((0.4 + 0.4 + 0.3) / 0.75)
    assert busy_share(model, playing(3), 4) == pytest.approx(0.45 / 0.75)
    assert busy_share(model, [*playing(1), *playing(1, "other")], 2) == pytest.approx(0.6 / 0.75)


def test_recaches_are_charged_to_each_session_alone() -> None:
    model = model_of(b1=0.3, b2=0.4)
    model.observe_recache(1, 0.05)
    often = [replace(d, recaches_per_chunk=1.0, recache_chunks=3) for d in playing(2)]
    assert busy_share(model, often, 2) == pytest.approx((0.4 + 2 * 0.15) / 0.75)


def test_a_session_is_charged_for_the_costliest_of_its_chunks_to_come() -> None:
    model = CostModel()
    for chunk, seconds in enumerate((0.42, 0.40, 0.33, 0.36)):
        model.observe(ChunkKind.of(StepSchedule(), chunk, WINDOW), 1, seconds)
    found = [demand_of(Progress(StepSchedule(), chunk), GEOMETRY, WINDOW, model) for chunk in (0, 1, 2, 9)]
    assert [demand.kind for demand in found] == [ChunkKind(4, 0), ChunkKind(3, 1), ChunkKind(2, 3), ChunkKind(2, 3)]
    assert [demand.media_s for demand in found] == [0.5625, 0.75, 0.75, 0.75]
    assert found[2].key == found[3].key != found[1].key
    short = demand_of(Progress(StepSchedule(), 2, total_chunks=3), GEOMETRY, WINDOW, model)
    assert short.kind == ChunkKind(2, 2), "it never gets to the full window"


def test_a_session_is_charged_its_recaches_and_no_less_than_the_usual_rate() -> None:
    model = model_of(b1=0.3)
    model.observe_chunk(True, smoothing=0.1)
    found = [demand_of(Progress(StepSchedule(), 9, None, n), GEOMETRY, WINDOW, model) for n in (0.0, 0.25, 1.0)]
    assert [demand.recaches_per_chunk for demand in found] == [0.1, 0.25, 1.0]
    assert {demand.recache_chunks for demand in found} == {3}


# Who is admitted


def test_sessions_are_admitted_up_to_the_share_and_the_next_is_refused() -> None:
    budget = Budget(model_of(b1=0.3, b2=0.4), share=0.9, batch_limit=2)
    # 1: 0.40, 2: 0.53, 3: 0.93
    (wanted,) = playing(1)
    budget.admit(playing(1), wanted)
    with pytest.raises(BudgetError, match="0.93 s of work per second of media, allowed is 0.9") as refused:
        budget.admit(playing(2), wanted)
    assert refused.value.retry_after_s == 60.0 and refused.value.reason == "budget"
    Budget(model_of(b1=0.3, b2=0.4), share=0.95, batch_limit=2).admit(playing(2), wanted)


def test_retry_after_is_when_enough_sessions_have_ended() -> None:
    budget = Budget(model_of(b1=0.3), share=0.9, batch_limit=1)  # two fit, at 0.4 each
    (wanted,) = playing(1)
    ends = [7.0, 3.0, 12.0]
    load = [replace(wanted, remaining_s=end) for end in ends]
    assert budget.retry_after_s(load, wanted) == 7.0, "after 3 s there are still two"
    assert budget.retry_after_s(load[:2], wanted) == 3.0
    assert budget.retry_after_s([replace(wanted, remaining_s=0.2)] * 2, wanted) == 1.0
    assert budget.retry_after_s([replace(wanted, remaining_s=900.0)] * 2, wanted) == 60.0
    assert budget.retry_after_s(playing(2), wanted) == 60.0
    assert [bounded_s(s) for s in (-1.0, 1.5, 61.0, float("inf"))] == [1.0, 1.5, 60.0, 60.0]


def test_an_engine_that_nobody_plays_on_takes_a_session_that_is_too_slow_for_it() -> None:
    budget = Budget(model_of(b1=3.0), share=0.1)
    budget.admit([], playing(1)[0])
    with pytest.raises(BudgetError):
        budget.admit(playing(1), playing(1)[0])


kinds = st.builds(ChunkKind, st.integers(1, 6), st.integers(0, 3))
demands = st.builds(
    lambda kind, media_s, recaches, remaining_s: Demand(kind, kind, media_s, recaches, 3, remaining_s),
    kinds,
    st.sampled_from([0.5625, 0.75]),
    st.floats(0, 1),
    st.one_of(st.just(float("inf")), st.floats(0, 1e4)),
)
observations = st.lists(st.tuples(kinds, st.integers(1, 4), st.floats(1e-4, 2.0)), max_size=12)


def measured(found: list[tuple[ChunkKind, int, float]]) -> CostModel:
    model = CostModel()
    for kind, batch, seconds in found:
        model.observe(kind, batch, seconds)
        model.observe_recache(batch, seconds)
    return model


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(observations, st.lists(demands, max_size=12), st.floats(0.05, 1.0), st.integers(1, 4))
def test_nobody_is_ever_admitted_past_the_budget_and_an_empty_engine_refuses_nobody(
    found: list[tuple[ChunkKind, int, float]], arriving: list[Demand], share: float, limit: int
) -> None:
    budget, admitted = Budget(measured(found), share, limit), list[Demand]()
    for wanted in arriving:
        try:
            budget.admit(admitted, wanted)
        except BudgetError as error:
            assert admitted and busy_share(budget.model, [*admitted, wanted], limit) > share
            assert 1.0 <= error.retry_after_s <= 60.0
            continue
        admitted.append(wanted)
        assert len(admitted) == 1 or busy_share(budget.model, admitted, limit) <= share


@settings(max_examples=200, deadline=None)
@given(observations, kinds, st.integers(1, 8))
def test_a_batch_is_predicted_dearer_than_its_sessions_only_if_measured_so(
    found: list[tuple[ChunkKind, int, float]], kind: ChunkKind, batch: int
) -> None:
    model = measured(found)
    known = {(other, size) for other, size, _ in found}
    if (kind, batch) not in known:
        assert model.step_s(kind, batch) <= batch * model.step_s(kind, 1) * (1 + 1e-9)
