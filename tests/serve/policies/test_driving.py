"""What a driver does next, as a table: what it knows, and the action."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from serve.policies.driving import DriveState, End, Move, Pause, Pull, Wait, next_action
from serve.policies.pacing import PlaybackClock
from serve.records import DriveDecision, Refused

NOW_S = 100.0
GO = DriveDecision(go=True)
WATCHED = DriveDecision(go=True, readers=1, had_reader=True)
LOST = Refused("session_lost", "gone")
UNWELL = Refused("replica_unwell", "it hangs", retry_after_s=2.0)
LATE = Refused("replica_late", "busy", retry_after_s=2.0)
SILENT = Refused("replica_silent", "no answer", retry_after_s=1.0)
FAILED = Refused("generation_failed", "in chunk 3")


def state(decision: DriveDecision, played_s: float | None = None, **changes: Any) -> DriveState:
    """A video that nobody paces and that is made for its file; `played_s` since its first viewer came."""
    clock = PlaybackClock(1.0, lambda: NOW_S)
    if played_s is not None:
        clock.start(played_s)
    about: dict[str, Any] = {"live": False, "paced": False, "start_timeout_s": 10.0, "unwatched_since_s": NOW_S - 1.0}
    return DriveState(clock, decision=decision, **(about | changes))


LIVE = {"live": True}
PACED = {"live": True, "paced": True, "chunk": 3}
TABLE: dict[str, tuple[DriveState, Any]] = {
    "another driver has it": (state(DriveDecision(go=False, superseded=True)), End(None)),
    "it was ended": (state(DriveDecision(go=False)), End("cancelled")),
    "all is made": (state(GO, whole=True), End("completed")),
    "nobody paces it": (state(GO), Pull(8)),
    "its first viewer may still come": (state(GO, **LIVE), Pull(8)),
    "nobody came": (
        state(GO, **LIVE, unwatched_since_s=NOW_S - 11.0),
        End("cancelled", "abandoned", "nobody watches it any more"),
    ),
    "its viewer left": (
        state(DriveDecision(go=True, had_reader=True), **LIVE),
        End("cancelled", "abandoned", "nobody watches it any more"),
    ),
    "its file is made though a viewer left": (state(DriveDecision(go=True, had_reader=True)), Pull(8)),
    "its viewer may come back": (state(DriveDecision(go=True, had_reader=True, returning=True), **LIVE), Pause(True)),
    "its viewer waits": (state(DriveDecision(go=True, readers=1, paused=True), **LIVE), Pause(True)),
    "he still waits": (state(DriveDecision(go=True, readers=1, paused=True), **LIVE, paused=True), Wait(0.75)),
    "he is back": (state(WATCHED, **LIVE, paused=True), Pause(False)),
    "enough is ahead": (state(WATCHED, 2.0, **PACED, media_s=3.5), Wait(0.5)),
    "the lead is used up": (state(WATCHED, 2.0, **PACED, media_s=2.5), Pull(0)),
    "nobody plays yet": (state(GO, **PACED, media_s=2.0), Wait(0.75)),
    "others' first chunks go before a second one": (
        state(WATCHED, 0.0, **(PACED | {"chunk": 1}), media_s=0.5625),
        Wait(0.5625 - 0.4),
    ),
    "his player has enough": (
        state(DriveDecision(go=True, readers=1, position_s=1.0, window_s=2.0), **PACED, media_s=3.5),
        Wait(0.5),
    ),
    "his player has just enough": (
        state(DriveDecision(go=True, readers=1, position_s=1.0, window_s=2.0), **PACED, media_s=3.0),
        Wait(0.05),
    ),
    "his player wants more": (
        state(DriveDecision(go=True, readers=1, position_s=1.1, window_s=2.0), **PACED, media_s=3.0),
        Pull(0),
    ),
    "its replica is gone": (state(WATCHED, trouble=LOST), Move(LOST)),
    "its engine hangs": (state(WATCHED, trouble=UNWELL, losses=1, lost_chunk=0), Move(UNWELL)),
    "two were lost in a chunk": (state(WATCHED, trouble=LOST, losses=2, lost_chunk=0), Move(LOST)),
    "a third one": (
        state(WATCHED, trouble=LOST, losses=3, lost_chunk=0),
        End("failed", "generation_failed", "3 replicas were lost in one chunk of it"),
    ),
    "three, but in an earlier chunk": (state(WATCHED, trouble=LOST, losses=3, lost_chunk=0, chunk=1), Move(LOST)),
    "its chunk failed": (state(WATCHED, trouble=FAILED), End("failed", "generation_failed", "in chunk 3")),
    "its engine is late": (state(WATCHED, trouble=LATE), Move(LATE, once=True)),
    "its replica is silent": (state(WATCHED, trouble=SILENT, silent_since_s=NOW_S), Move(SILENT, once=True)),
    "late, and no other one took it just now": (state(WATCHED, trouble=LATE, next_slow_move_s=NOW_S + 1.0), Pull(8)),
    "late, whatever was lost before": (
        state(WATCHED, trouble=LATE, losses=3, lost_chunk=0, next_slow_move_s=NOW_S + 1.0),
        Pull(8),
    ),
    "silent for minutes": (
        state(WATCHED, trouble=SILENT, silent_since_s=NOW_S - 121.0),
        End("failed", "session_lost", "its replica has not answered for 120 s"),
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_a_driver_knows_says_what_it_does(case: str) -> None:
    known, action = TABLE[case]
    assert next_action(known, NOW_S) == action


def test_lateness_and_silence_count_as_no_loss() -> None:
    drive = state(WATCHED)
    for trouble in (LATE, SILENT, LATE, SILENT):
        drive.note_trouble(trouble, NOW_S)
    assert drive.losses == 0 and drive.silent_since_s == NOW_S
    drive.note_trouble(None, NOW_S)
    assert drive.silent_since_s is None and next_action(drive, NOW_S) == Pull(8)


def test_losses_are_counted_by_the_chunk() -> None:
    drive = state(WATCHED)
    for _ in range(2):
        drive.note_trouble(UNWELL, NOW_S, lost=True)
    assert (drive.losses, drive.lost_chunk) == (2, 0)
    drive.chunk = 1
    drive.note_trouble(UNWELL, NOW_S, lost=True)
    assert (drive.losses, drive.lost_chunk) == (1, 1)


def test_a_simulation_decides_without_ray() -> None:
    code = "import sys, serve.policies.driving; print('ray' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "False\n", done.stderr
