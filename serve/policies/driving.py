"""What a video's driver does next: one pure decision, which the live driver carries out and a simulation can share.

Late is not lost: a replica whose steps are late, or that does not answer in time, may be left for another one that has
room, but it counts as no loss. Lost is a replica whose process ended, or whose engine its own deadline shows to hang.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.policies.pacing import PlaybackClock
from serve.records import DriveDecision, Refused

LOOK_EVERY_S = 0.75  # how soon a driver that waits sees that its last reader left
LOOK_AT_REPLICA_S = 1.0  # and that its replica drains or is gone, where no pull has shown of late that it is there
SLOW_MOVE_EVERY_S = 30.0  # a move costs the replica that takes it a restored cache: on a busy machine all are slower
SILENCE_PATIENCE_S = 120.0  # Serve has replaced a process that hangs long before
_SECOND_AHEAD_S = 0.4  # of media left to a viewer when his second chunk is asked for: others' first ones come first
_LOOK_AT_POSITION_S = 0.05  # how soon it sees that a viewer's own player has come as far as is waited for
_AHEAD = 8  # chunks that are begun behind the one that is waited for, where nobody paces them: the engine never idles
_MOST_LOSSES = 3
_LOST = ("session_lost", "chunk_gone", "replica_unwell")  # another replica can continue from there
LATE, SILENT = "replica_late", "replica_silent"


@dataclass(frozen=True)
class Wait:
    """Look again so much later."""

    seconds: float


@dataclass(frozen=True)
class Pull:
    """Take the next chunk, with `ahead` more begun behind it."""

    ahead: int


@dataclass(frozen=True)
class Pause:
    """Free the session's cache (`paused`), or take it again."""

    paused: bool


@dataclass(frozen=True)
class Move:
    """Continue on another replica. `once`: only if one takes it at once; else the session stays where it is."""

    cause: Refused
    once: bool = False


@dataclass(frozen=True)
class End:
    """Stop driving. `outcome` is None when another driver has the video; the store is told `code`, if there is one."""

    outcome: str | None
    code: str = ""
    message: str = ""


Action = Wait | Pull | Pause | Move | End


@dataclass
class DriveState:
    """What a driver knows of its video. `trouble` is why the replica gave no chunk; times are of `clock`'s kind."""

    clock: PlaybackClock
    live: bool
    paced: bool
    start_timeout_s: float
    unwatched_since_s: float
    chunk: int = 0
    media_s: float = 0.0
    whole: bool = False
    paused: bool = False
    decision: DriveDecision = field(default_factory=lambda: DriveDecision(go=True))
    trouble: Refused | None = None
    silent_since_s: float | None = None
    next_slow_move_s: float = float("-inf")
    losses: int = 0
    lost_chunk: int = -1

    def note_trouble(self, trouble: Refused | None, now_s: float, lost: bool = False) -> None:
        """How a question to the replica ended; `lost`: its process is gone, or its engine hangs or is broken."""
        self.trouble = trouble
        if trouble is None or trouble.code != SILENT:
            self.silent_since_s = None
        elif self.silent_since_s is None:
            self.silent_since_s = now_s
        if lost:
            self.losses = self.losses + 1 if self.lost_chunk == self.chunk else 1
            self.lost_chunk = self.chunk


def next_action(state: DriveState, now_s: float) -> Action:
    """What to do now, by what store and replica last said."""
    decision = state.decision
    if not decision.go:
        return End(None if decision.superseded else "cancelled")
    if state.whole:
        return End("completed")
    if state.trouble is not None and (action := _answer(state, state.trouble, now_s)) is not None:
        return action
    if state.live and not decision.readers and not decision.returning and _is_abandoned(state, now_s):
        return End("cancelled", "abandoned", "nobody watches it any more")
    pause = decision.paused or (state.live and decision.returning)
    if pause != state.paused:
        return Pause(pause)
    wait_s = LOOK_EVERY_S if state.paused else wait_before_pull_s(state)
    if wait_s > 0:
        return Wait(min(wait_s, LOOK_EVERY_S))
    return Pull(0 if state.paced or decision.position_s is not None else _AHEAD)


def _answer(state: DriveState, trouble: Refused, now_s: float) -> Action | None:
    """What trouble at the replica calls for; None: ask again."""
    if trouble.code in (LATE, SILENT):
        if state.silent_since_s is not None and now_s - state.silent_since_s > SILENCE_PATIENCE_S:
            return End("failed", "session_lost", f"its replica has not answered for {SILENCE_PATIENCE_S:g} s")
        return Move(trouble, once=True) if now_s >= state.next_slow_move_s else None
    if trouble.code not in _LOST:
        return End("failed", trouble.code, trouble.message)
    if state.lost_chunk == state.chunk and state.losses >= _MOST_LOSSES:
        return End("failed", "generation_failed", f"{_MOST_LOSSES} replicas were lost in one chunk of it")
    return Move(trouble)


def _is_abandoned(state: DriveState, now_s: float) -> bool:
    """Whether its readers left, or none came for long: a store that restarts forgets them until they ask again."""
    return state.decision.had_reader or now_s - state.unwatched_since_s > state.start_timeout_s


def media_ahead_s(state: DriveState) -> float:
    """Media that is made and not yet played, by the viewer's own player or by a clock that stands for it."""
    position_s = state.decision.position_s
    return state.media_s - (state.clock.position_s() if position_s is None else position_s)


def wait_before_pull_s(state: DriveState) -> float:
    """How long until the next chunk may be made."""
    decision, ahead_s = state.decision, media_ahead_s(state)
    if decision.position_s is not None:
        beyond_s = ahead_s - (decision.window_s or 0.0)
        return 0.0 if beyond_s < 0 else max(_LOOK_AT_POSITION_S, beyond_s)  # nobody plays faster than time goes
    if not state.paced:
        return 0.0
    wait_s = state.clock.wait_s(state.media_s)
    if state.chunk == 1 and state.clock.started:
        wait_s = max(wait_s, ahead_s - _SECOND_AHEAD_S)
    return wait_s
