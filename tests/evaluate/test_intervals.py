"""Intervals cover what they should, say little of few values, and are paired where clips are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diagonal.errors import FieldError
from diagonal.evaluate.intervals import ONE_SIDED, difference, difference_over_seeds, interval, over_seeds


def test_a_rate_of_1_of_few_clips_says_little_and_of_many_says_much() -> None:
    few, many = interval([1.0] * 4, rate=True), interval([1.0] * 2000, rate=True)
    assert few.mean == many.mean == few.high == 1.0
    assert few.low == pytest.approx(
        4 / (4 + 1.959964**2), abs=1e-6
    )  # Wilson's in closed form where every value is a hit
    assert many.low > 0.998


@pytest.mark.parametrize("rate", [True, False])
def test_95_in_100_intervals_hold_the_truth(rate: bool) -> None:
    draw = np.random.default_rng(1)
    samples = draw.random((100, 60)) < 0.8 if rate else draw.normal(0.8, 1.0, (100, 60))
    held = [(found := interval([float(v) for v in row], rate)).low <= 0.8 <= found.high for row in samples]
    assert 0.87 <= np.mean(held) <= 0.99


def test_a_difference_is_paired_by_clip() -> None:
    draw = np.random.default_rng(2)
    ours = draw.normal(0, 1, 100)
    theirs = ours - 0.1
    assert difference(list(ours), list(theirs)).low == pytest.approx(0.1)
    shuffled = difference(list(ours), list(draw.permutation(theirs)))
    assert shuffled.low < 0.0 < shuffled.high
    hits = [1.0] * 90 + [0.0] * 10
    same, apart = difference(hits, hits, rate=True), difference(hits, hits[::-1], rate=True)
    assert same.low > -0.035 and apart.low < -0.07


def test_a_few_clips_that_agree_prove_no_equality_of_rates() -> None:
    assert difference([1.0] * 6, [1.0] * 6, rate=True).low < -0.3
    assert difference([1.0] * 2000, [1.0] * 2000, rate=True).low > -0.003


def test_an_interval_over_three_seeds_holds_the_errors_of_seeds_and_of_clips() -> None:
    alike = over_seeds([[0.90] * 5, [0.92] * 5, [0.94] * 5])
    assert alike.count == 5 and alike.high - alike.mean == pytest.approx(4.30265273 * 0.02 / math.sqrt(3))
    clips = list(np.random.default_rng(3).normal(0.5, 0.1, 200))
    one, same = over_seeds([clips]), over_seeds([clips, clips, clips])
    assert one == interval(clips) and same.half_width == pytest.approx(one.half_width)
    apart = over_seeds([[value + more for value in clips] for more in (-0.02, 0.0, 0.02)])
    assert apart.half_width == pytest.approx(math.hypot(one.half_width, 4.30265273 * 0.02 / math.sqrt(3)), rel=1e-3)


def test_three_seeds_that_all_hit_few_clips_prove_no_rate_of_1() -> None:
    assert over_seeds([[1.0] * 4] * 3, rate=True).low == interval([1.0] * 4, rate=True).low < 0.6


def test_differences_over_seeds_are_paired_and_one_row_stands_for_all_seeds() -> None:
    theirs = list(np.random.default_rng(4).normal(0.5, 0.1, 50))
    ours = [[value + more for value in theirs] for more in (0.01, 0.02, 0.03)]
    found = difference_over_seeds(ours, [theirs])
    assert found.mean == pytest.approx(0.02) and found.half_width == pytest.approx(4.30265273 * 0.01 / math.sqrt(3))
    assert difference_over_seeds(ours, [[v + 0.005 * n for v in theirs] for n in (2, 4, 6)]).low == pytest.approx(0.0)


def test_values_that_are_not_there_or_not_paired_are_refused() -> None:
    with pytest.raises(FieldError, match="values"):
        interval([])
    with pytest.raises(FieldError, match="ours"):
        difference([1.0], [1.0, 0.0])


def test_eleven_seeds_are_widened_by_students_t_of_ten_degrees_of_freedom() -> None:
    seeds = [[float(seed)] * 4 for seed in range(11)]
    half = 2.228139 * float(np.std(range(11), ddof=1)) / 11**0.5
    assert over_seeds(seeds).half_width == pytest.approx(half, rel=1e-6)


def test_an_end_at_level_90_is_a_one_sided_bound_of_95() -> None:
    values = [float(v) for v in np.random.default_rng(3).normal(size=400)]
    two, one = interval(values), interval(values, level=ONE_SIDED)
    assert two.low < one.low < one.mean < one.high < two.high
    assert one.half_width / two.half_width == pytest.approx(1.645 / 1.96, rel=0.08)
    seeds = [[v + shift for v in values] for shift in (0.0, 0.1, 0.2)]
    zeros = [[0.0] * len(values)]
    assert difference_over_seeds(seeds, zeros).low < difference_over_seeds(seeds, zeros, level=ONE_SIDED).low
