"""Intervals cover what they should, say little of few values, and are paired where clips are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diagonal.errors import FieldError
from diagonal.evaluate.intervals import difference, interval, over_seeds


def test_a_rate_of_1_of_few_clips_says_little_and_of_many_says_much() -> None:
    few, many = interval([1.0] * 4, rate=True), interval([1.0] * 2000, rate=True)
    assert few.mean == many.mean == few.high == 1.0
    assert few.low == pytest.approx(4 / (4 + 1.96**2), abs=1e-6)  # Wilson's in closed form where every value is a hit
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


def test_three_seeds_are_three_values_however_many_clips_they_have() -> None:
    found = over_seeds([0.90, 0.92, 0.94])
    assert found.count == 3 and found.high - found.mean == pytest.approx(4.303 * 0.02 / math.sqrt(3))
    assert math.isnan(over_seeds([0.9]).low) and over_seeds([0.9]).to_dict()["low"] is None


def test_values_that_are_not_there_or_not_paired_are_refused() -> None:
    with pytest.raises(FieldError, match="values"):
        interval([])
    with pytest.raises(FieldError, match="ours"):
        difference([1.0], [1.0, 0.0])
