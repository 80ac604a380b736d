"""The scheduler: the least slack goes first, and takes along those that can share its forward."""

from __future__ import annotations

import itertools

import pytest

from diagonal.engine.scheduler import Candidate, choose


def test_nobody_asks_nobody_is_chosen() -> None:
    assert choose([], 4) == []


def test_the_least_slack_goes_first_in_any_order_of_asking() -> None:
    asking = [Candidate("late", -2.0, "k"), Candidate("new", float("-inf"), "k"), Candidate("ahead", 5.0, "k")]
    for order in itertools.permutations(asking):
        assert choose(order, 4) == ["new", "late", "ahead"]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_batch_is_no_larger_than_its_limit(limit: int) -> None:
    asking = [Candidate(str(number), float(number), "k") for number in range(5)]
    assert choose(asking, limit) == [str(number) for number in range(limit)]


def test_only_those_that_share_the_first_ones_key_come_along() -> None:
    asking = [Candidate("a", 1.0, "x"), Candidate("b", 0.0, "y"), Candidate("c", 2.0, "y"), Candidate("d", -1.0, "z")]
    assert choose(asking, 4) == ["d"]
    assert choose(asking[:3], 4) == ["b", "c"]


def test_equal_slack_is_settled_by_name() -> None:
    assert choose([Candidate("b", 0.0, "k"), Candidate("a", 0.0, "k")], 2) == ["a", "b"]


def test_what_nobody_waits_for_comes_behind_every_playing_session_and_joins_none() -> None:
    asking = [Candidate("bg", float("-inf"), "k", paced=False), Candidate("late", -9.0, "k", paced=False),
              Candidate("live", 30.0, "k"), Candidate("other", 40.0, "k")]  # fmt: skip
    for order in itertools.permutations(asking):
        assert choose(order, 4) == ["live", "other"]
    assert choose(asking[:2], 4) == ["bg", "late"]


def test_a_batch_that_nobody_waits_for_is_bounded_by_its_key_and_a_playing_one_is_not() -> None:
    background = [Candidate(str(n), float(n), "k", paced=False) for n in range(3)]
    assert choose(background, 4, lambda key: 2 if key == "k" else 9) == ["0", "1"]
    live = [Candidate(str(n), float(n), "k") for n in range(3)]
    assert choose(live, 4, lambda key: 2 if key == "k" else 9) == ["0", "1", "2"]
