"""How many replicas there should be: monotone in load, never below need or above the limit, and quiet when it is."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve.policies.autoscaling import Load, SessionScaling, connection_scaling, fewest, replicas_for, session_scaling

MOST = 64


@st.composite
def a_load(draw: st.DrawFn, slots: int = 8) -> Load:
    """A replica within its limits: sessions of some share each."""
    sessions = draw(st.integers(0, slots))
    each = draw(st.floats(0.0, 1.0 / max(1, sessions)))
    return Load(sessions, slots, sessions * each, draw(st.sampled_from([0, 0, 3])))


LOADS = st.lists(a_load(), min_size=1, max_size=12)
SPARE = st.floats(0.0, 0.6)
TARGET = st.integers(1, MOST)


def fits(loads: list[Load], replicas: int, order: random.Random) -> bool:
    """Whether the sessions find room one by one, each at any replica that takes it."""
    sessions = [load.busy / load.sessions for load in loads for _ in range(int(load.sessions))]
    rooms = [[0, 0.0] for _ in range(replicas)]
    order.shuffle(sessions)
    for share in sessions:
        open_rooms = [room for room in rooms if room[0] < 8 and room[1] + share <= 1.0 + 1e-6]
        if not open_rooms:
            return False
        room = order.choice(open_rooms)
        room[0], room[1] = room[0] + 1, room[1] + share
    return True


@given(LOADS, TARGET, SPARE, st.integers(1, 4), st.integers(4, 20))
def test_there_are_as_many_as_slots_and_time_need_within_the_limits(
    loads: list[Load], target: int, spare: float, least: int, most: int
) -> None:
    wanted = replicas_for(loads, target, least, most, spare)
    sessions, busy = sum(load.sessions for load in loads), sum(load.busy for load in loads)
    assert max(least, min(math.ceil(max(sessions / 8, busy) - 1e-6), most)) <= wanted <= most


@pytest.mark.slow
@given(LOADS, SPARE, st.randoms(use_true_random=False))
def test_replicas_go_only_when_their_sessions_find_room_elsewhere(
    loads: list[Load], spare: float, order: random.Random
) -> None:
    wanted = replicas_for(loads, len(loads), 1, MOST, spare)
    assert wanted >= len(loads) or fits(loads, wanted, order)
    assert fits(loads, fewest(loads), order)


@given(LOADS, TARGET, SPARE, st.data())
def test_more_load_never_means_fewer_replicas(
    loads: list[Load], target: int, spare: float, data: st.DataObject
) -> None:
    wanted = replicas_for(loads, target, 1, MOST, spare)
    place = data.draw(st.integers(0, len(loads) - 1))
    before = loads[place]
    share = before.busy / before.sessions if before.sessions else 0.0
    more = data.draw(
        st.sampled_from(
            [
                replace(before, busy=before.busy + 0.3),
                replace(before, sessions=before.sessions + 1, busy=before.busy + share),
                replace(before, refused=before.refused + 1),
            ]
        )
    )
    assert replicas_for([*loads[:place], more, *loads[place + 1 :]], target, 1, MOST, spare) >= wanted


@given(st.integers(0, 40), st.floats(0.0, 0.5), TARGET, SPARE)
def test_at_a_constant_load_the_number_settles_at_once_and_stays(
    sessions: int, share: float, target: int, spare: float
) -> None:
    def spread(replicas: int) -> list[Load]:
        counts = [len(range(first, sessions, replicas)) for first in range(replicas)]
        return [Load(count, 8, count * share) for count in counts]

    settled = replicas_for(spread(target), target, 1, MOST, spare)
    assert [replicas_for(spread(settled), settled, 1, MOST, spare) for _ in range(3)] == [settled] * 3


@given(st.integers(1, 40), st.floats(0.0, 0.4), SPARE, st.floats(-0.04, 0.04))
@example(3, 0.4001, 0.4, -0.01)
def test_a_measure_that_trembles_does_not_move_the_number_back(
    sessions: int, share: float, spare: float, noise: float
) -> None:
    at_first = replicas_for([Load(sessions, 8, sessions * share)], 1, 1, MOST, spare)
    calm = [Load(sessions, 8, sessions * share)] + [Load(0, 8, 0.0)] * (at_first - 1)
    trembling = [replace(load, busy=load.busy * (1 + noise)) for load in calm]
    assert replicas_for(trembling, at_first, 1, MOST, spare) >= at_first or sessions * share * abs(noise) > 0.1


def test_by_hand() -> None:
    idle, full = Load(0, 4, 0.0), Load(4, 4, 0.2)
    assert replicas_for([], 2, 1, 8, 0.2) == 2, "nobody told yet: as before"
    assert replicas_for([idle], 1, 1, 8, 0.2) == 1
    assert replicas_for([full], 1, 1, 8, 0.2) == 2, "no slot is spare"
    assert replicas_for([full, idle], 2, 1, 8, 0.2) == 2
    assert replicas_for([Load(1, 4, 0.9)], 1, 1, 8, 0.2) == 2, "there are slots but no time"
    assert replicas_for([idle, idle, idle], 3, 1, 8, 0.2) == 1
    assert replicas_for([idle, idle], 3, 1, 8, 0.2) == 3, "one of three has not told yet"
    assert replicas_for([replace(idle, refused=1)], 1, 1, 8, 0.2) == 2
    assert replicas_for([replace(idle, refused=1)], 2, 1, 8, 0.2) == 2, "the second one is on its way"
    assert replicas_for([full] * 4, 4, 1, 4, 0.2) == 4
    assert fewest([Load(3, 8, 1.8), Load(0, 8, 0.0)]) == 3, "two sessions of 0.6 do not fit into one"
    assert replicas_for([Load(1, 8, 0.6)] * 3, 3, 1, 8, 0.0) == 3


def context(metrics: dict[str, dict[str, list[float]]], target: int = 2) -> Any:
    series = {
        name: {replica: [SimpleNamespace(value=value) for value in values] for replica, values in told.items()}
        for name, told in metrics.items()
    }
    limits = {"capacity_adjusted_min_replicas": 1, "capacity_adjusted_max_replicas": 9}
    return SimpleNamespace(raw_metrics=series, target_num_replicas=target, **limits)


def test_the_policy_reads_what_each_replica_told_last() -> None:
    told = {"sessions": {"a": [0.0, 4.0], "b": [4.0]}, "slots": {"a": [4.0, 4.0], "b": [4.0]}}
    told |= {"busy": {"a": [0.0, 0.4], "b": [0.4]}, "refused": {"a": [3.0, 0.0], "b": [0.0]}}
    assert SessionScaling(0.2)(context(told)) == (3, {})
    told["busy"].pop("b")
    assert SessionScaling(0.2)(context(told)) == (2, {}), "what b holds is not known"


ELSEWHERE = """
import sys, types
from ray import cloudpickle
kind = cloudpickle.load(open(sys.argv[1], "rb"))
told = {"sessions": 9.0, "slots": 3.0, "busy": 0.1, "refused": 0.0}
metrics = {name: {"a": [types.SimpleNamespace(value=value)]} for name, value in told.items()}
limits = {"capacity_adjusted_min_replicas": 1, "capacity_adjusted_max_replicas": 9, "target_num_replicas": 1}
print(kind(headroom=0.25)(types.SimpleNamespace(raw_metrics=metrics, **limits))[0])
assert not [name for name in sys.modules if name.startswith(("serve", "diagonal", "torch"))]
"""


def test_the_policy_runs_in_a_process_that_has_no_module_of_ours(tmp_path: Path) -> None:
    config = session_scaling(1, 3, 5.0, 300.0, 0.25)
    assert (config.min_replicas, config.max_replicas, config.downscale_delay_s) == (1, 3, 300.0)
    assert config.policy.policy_kwargs == {"headroom": 0.25}
    (tmp_path / "policy").write_bytes(config.policy.get_serialized_policy_def() or b"")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path / "policy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["4"], done.stderr


def test_gateways_scale_on_their_connections() -> None:
    config = connection_scaling(2, 6, 5.0, 60.0, 200)
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 6, 200)
    assert config.policy.is_default_policy_function()


def test_a_load_of_nothing_needs_nothing() -> None:
    assert fewest([]) == 0 and fewest([Load(0, 0, 0.0)]) == 0
    assert fewest([Load(2, 4, 2.0)]) == 2, "each takes all of a replica's time"
