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
    asking = [
        Candidate("bg", float("-inf"), "k", paced=False),
        Candidate("late", -9.0, "k", paced=False),
        Candidate("live", 30.0, "k"),
        Candidate("other", 40.0, "k"),
    ]
    for order in itertools.permutations(asking):
        assert choose(order, 4) == ["live", "other"]
    assert choose(asking[:2], 4) == ["bg", "late"]


def steps(key: object, sessions: int) -> float:
    """A session alone takes 1 s, each further one half a second more."""
    return 1.0 + 0.5 * (sessions - 1)


def test_a_batch_that_nobody_waits_for_is_cut_to_its_time_and_is_never_empty() -> None:
    background = [Candidate(str(n), -float(n), "k", paced=False) for n in range(3)]
    assert choose(background, 4, steps, 1.6) == ["2", "1"]
    assert choose(background, 4, steps, 0.1) == ["2"], "somebody's, or nothing would ever be made"
    assert choose(background, 4, steps) == ["2", "1", "0"]


@pytest.mark.parametrize(("slack_s", "size"), [(0.9, 4), (1.0, 1), (1.6, 2), (2.1, 3), (9.0, 4)])
def test_a_batch_ends_before_its_tightest_member_runs_out_where_that_can_be(slack_s: float, size: int) -> None:
    asking = [Candidate("tight", slack_s, "k"), *(Candidate(f"z{n}", 9.0 + n, "k") for n in range(3))]
    assert choose(asking, 4, steps) == ["tight", "z0", "z1", "z2"][:size]


def test_a_recache_of_any_member_delays_them_all() -> None:
    """Slack is net of a session's own re-cache; its deadline is not, and another's re-cache stands before it."""
    asking = [Candidate("a", 1.6, "k"), Candidate("b", 2.0, "k", recache_s=0.2), Candidate("c", 3.0, "k")]
    assert choose(asking, 4, steps) == ["a"]
    assert choose([asking[0], asking[2]], 4, steps) == ["a", "c"]
    late = [Candidate("a", 0.9, "k", recache_s=1.0), Candidate("b", 1.1, "k")]
    assert choose(late, 4, steps) == ["a", "b"], "late anyhow: together, to make up for it"
    assert choose([Candidate("a", 1.0, "k", recache_s=1.0), Candidate("b", 2.4, "k")], 4, steps) == ["a"]


def test_first_chunks_are_made_together_as_nobody_of_them_plays_yet() -> None:
    assert choose([Candidate(str(n), float("-inf"), "k") for n in range(3)], 4, steps) == ["0", "1", "2"]
