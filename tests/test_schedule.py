"""Step schedules: strings, levels, cost and context."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from diagonal.errors import FieldError
from diagonal.schedule import RAW_STEPS, Context, StepSchedule, raw_level, warp

WAN_CHUNKS = 7


@pytest.mark.parametrize(
    ("steps", "total"),
    [("4322222", 17), ("5432222", 20), ("5433333", 24), ("5333333", 23), ("4333333", 22), ("4222222", 16)],
)
def test_the_papers_strings_sum_to_its_steps_and_reuse_adds_no_forward(steps: str, total: int) -> None:
    schedule = StepSchedule(steps)
    assert schedule.total_forwards(WAN_CHUNKS) == total


def test_self_forcing_costs_28_steps_and_7_context_forwards() -> None:
    schedule = StepSchedule("self-forcing")
    assert 28
    assert schedule.total_forwards(WAN_CHUNKS) == 28 + 7
    assert schedule.resolved_context == 0.0
    assert schedule.levels(0) == schedule.levels(40) == tuple(raw_level(raw, 5.0) for raw in (1000, 750, 500, 250))


def test_a_context_level_costs_one_forward_more_a_chunk() -> None:
    assert StepSchedule("4322222", context=0.1).total_forwards(WAN_CHUNKS) == 17 + 7
    assert [StepSchedule("432", context=0.0).forwards(chunk) for chunk in range(4)] == [5, 4, 3, 3]


def test_levels_of_shift_5_are_the_papers_numbers() -> None:
    levels = StepSchedule("5").levels(0)
    assert levels == pytest.approx((1.0, 0.9375, 0.833333, 0.625, 0.357143), abs=1e-6)
    assert levels[:2] == (1.0, 0.9375)
    assert levels[4] == 0.5 / 1.4


def test_level_zero_is_exactly_clean_and_level_one_exactly_noise() -> None:
    assert [raw_level(0, 5.0), raw_level(1000, 5.0)] == [0.0, 1.0]


def test_shift_one_leaves_the_time_as_it_is_and_a_larger_shift_raises_it() -> None:
    for u in (0.1, 0.5, 0.9):
        assert warp(u, 1.0) == u < warp(u, 3.0) < warp(u, 5.0)


@pytest.mark.parametrize("steps", ["1", "2", "3", "4", "5", "self-forcing"])
def test_levels_fall_strictly_from_pure_noise(steps: str) -> None:
    levels = StepSchedule(steps, context=0.0).levels(0)
    assert levels[0] == 1.0 and levels[-1] > 0.0
    assert all(high > low for high, low in itertools.pairwise(levels))


def test_the_last_row_repeats_for_ever() -> None:
    schedule = StepSchedule("432")
    assert [len(schedule.levels(chunk)) for chunk in (0, 1, 2, 3, 1000)] == [4, 3, 2, 2, 2]


def test_uniform_four_steps_end_at_raw_100_and_self_forcing_at_raw_250() -> None:
    assert RAW_STEPS[4] == (1000, 750, 500, 100)
    assert StepSchedule("4444444").levels(3)[-1] == raw_level(100, 5.0)
    assert StepSchedule("self-forcing").levels(3)[-1] == raw_level(250, 5.0)


def test_a_string_may_name_the_raw_timestep_that_its_rows_end_at() -> None:
    schedule = StepSchedule("4322@250")
    assert schedule.raw_rows == ((1000, 750, 500, 250), (1000, 750, 250), (1000, 250), (1000, 250))
    assert schedule.total_forwards(WAN_CHUNKS) == 17 and schedule.context_level(9) == raw_level(250, 5.0)
    assert StepSchedule("54@100").rows == StepSchedule("54").rows
    assert StepSchedule("1@250", context=0.0).raw_rows == ((1000,),)  # one step has no other end
    for steps in ("5@250", "24@500", "2@0", "2@1000", "2@", "2@1e2", "@250", "2@25@5", "self-forcing@100"):
        with pytest.raises(FieldError, match="schedule.steps"):
            StepSchedule(steps)


@pytest.mark.parametrize("steps", ["1", "4321", "14"])
def test_reuse_with_a_one_step_row_is_refused_as_it_would_cache_pure_noise(steps: str) -> None:
    contexts: tuple[Context | None, ...] = (None, "reuse")
    for context in contexts:
        with pytest.raises(FieldError, match="schedule.context = 'reuse'.*pure noise"):
            StepSchedule(steps, context=context)
    assert StepSchedule(steps, context=0.0).levels(0)[0] == 1.0


def test_the_context_level_is_the_last_steps_under_reuse_and_the_given_one_otherwise() -> None:
    assert [StepSchedule("42").context_level(chunk) for chunk in (0, 5)] == [0.5 / 1.4] * 2
    assert StepSchedule("42", context=0.25).context_level(3) == 0.25
    assert StepSchedule("self-forcing", context="reuse").context_level(0) == 0.625


@pytest.mark.parametrize("steps", ["", "6", "0", "43a", "4 3", " 4", "Self-Forcing", "٣", 4322222])
def test_a_malformed_string_is_refused_with_what_is_allowed(steps: str) -> None:
    with pytest.raises(FieldError) as refused:
        StepSchedule(steps)
    assert (refused.value.field, refused.value.value) == ("schedule.steps", steps)
    assert "4322222" in refused.value.allowed and "self-forcing" in refused.value.allowed


def test_a_sink_context_is_the_first_chunks_alone_and_costs_a_forward_a_stream() -> None:
    schedule = StepSchedule("4322222", sink_context=0.0)
    assert schedule.total_forwards(WAN_CHUNKS) == 17 + 1 and schedule.forwards(9) == 2
    assert [schedule.context_level(chunk) for chunk in (0, 1)] == [0.0, raw_level(100, 5.0)]
    assert [schedule.context_of(chunk) for chunk in (0, 1)] == [0.0, "reuse"]
    levels = StepSchedule("432", context=0.3, sink_context=0.1)
    assert [levels.context_level(chunk) for chunk in range(3)] == [0.1, 0.3, 0.3]
    assert levels.total_forwards(3) == StepSchedule("432", context=0.3).total_forwards(3)
    assert StepSchedule("12", sink_context=0.0).forwards(0) == 2, "one step is no context, but its finished chunk is"
    assert levels.with_steps("4").sink_context == 0.1


@pytest.mark.parametrize("level", [-0.1, 1.1, math.nan, True, "reuse"])
def test_a_sink_context_that_is_no_level_is_refused(level: Any) -> None:
    with pytest.raises(FieldError, match=r"schedule.sink_context = .*: allowed is null, or a level in \[0, 1\]"):
        StepSchedule(sink_context=level)


@pytest.mark.parametrize("context", ["clean", -0.1, 1.1, math.nan, True])
def test_a_context_that_is_neither_reuse_nor_a_level_is_refused(context: object) -> None:
    with pytest.raises(FieldError, match="schedule.context"):
        StepSchedule("4", context=context)  # type: ignore[arg-type]


def test_other_values_out_of_range_are_refused() -> None:
    with pytest.raises(FieldError, match="schedule.shift = 0.5"):
        StepSchedule("4", shift=0.5)
    with pytest.raises(FieldError, match="raw timestep = 1001"):
        raw_level(1001, 5.0)
    with pytest.raises(FieldError, match="chunk = -1"):
        StepSchedule("4").levels(-1)
