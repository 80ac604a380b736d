"""Where sessions go: the replica that holds them, else where the fewest are."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

from serve.policies.routing import SessionRouter, address, elsewhere


def replica(name: str, sessions: int = 0, well: bool = True) -> Any:
    stats = {"sessions": sessions, "well": well}
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)


def request(session_id: str) -> Any:
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(metadata=SimpleNamespace(session_id=session_id), routing_context=context)


def router() -> SessionRouter:
    made = SessionRouter.__new__(SessionRouter)  # without Serve's own machinery, which needs a cluster
    made.initialize_state()
    return made


def first_choice(by: SessionRouter, candidates: list[Any], session_id: str) -> str:
    asked = request(session_id)
    ranks = asyncio.run(by.choose_replicas(candidates, asked))
    assert asked.routing_context.should_backoff
    return str(ranks[0][0].replica_id.unique_id)


def test_a_session_goes_to_the_replica_that_holds_it_however_full_it_is() -> None:
    candidates = [replica("a"), replica("b", sessions=9)]
    asked = request(address("b", "video_1"))
    ranks = asyncio.run(router().choose_replicas(candidates, asked))
    assert [[one.replica_id.unique_id for one in rank] for rank in ranks] == [["b"]]


def test_a_new_session_goes_where_the_fewest_are() -> None:
    assert first_choice(router(), [replica("a", 3), replica("b", 1), replica("c", 2)], "video_1") == "b"


def test_two_routers_place_a_new_session_alike() -> None:
    candidates = [replica(name) for name in "abcd"]
    for number in range(20):
        session = f"video_{number}"
        assert first_choice(router(), candidates, session) == first_choice(router(), candidates[::-1], session)


def test_new_sessions_spread_before_the_replicas_have_told_of_any() -> None:
    by, candidates = router(), [replica("a"), replica("b")]
    assert Counter(first_choice(by, candidates, f"video_{number}") for number in range(20)) == {"a": 10, "b": 10}


def test_a_session_of_a_replica_that_is_gone_goes_to_another_and_is_not_counted_there() -> None:
    by = router()
    assert first_choice(by, [replica("a")], address("b", "video_1")) == "a"
    assert not by._ranking._assigned


def test_a_call_without_a_session_goes_anywhere() -> None:
    assert first_choice(router(), [replica("a", 1), replica("b")], "") == "b"
    assert asyncio.run(router().choose_replicas([replica("a")], None))[0][0].replica_id.unique_id == "a"


def test_a_session_that_moves_goes_back_only_where_there_is_no_other() -> None:
    both = [replica("a"), replica("b", 3)]
    assert first_choice(router(), both, elsewhere("a", "video_1")) == "b"
    assert first_choice(router(), both[:1], elsewhere("a", "video_1")) == "a"


def test_sessions_that_move_together_spread() -> None:
    by, candidates = router(), [replica("a"), replica("b"), replica("c")]
    moved = Counter(first_choice(by, candidates, elsewhere("a", f"video_{number}")) for number in range(10))
    assert moved == {"b": 5, "c": 5}


def test_an_engine_that_is_not_well_is_given_sessions_last() -> None:
    assert first_choice(router(), [replica("a", well=False), replica("b", 3)], "video_1") == "b"
