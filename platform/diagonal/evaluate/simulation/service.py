"""A simulated service: gateways that route and drive, replicas that come and go, and viewers who wait or leave.

The decisions are the service's own, passed in as `Policies`: the order in which a router tries replicas, when the next
chunk of a stream may be made, which refusals are repeated without asking, how many replicas there should be.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Protocol

from diagonal.engine.budget import CapacityError
from diagonal.errors import require
from diagonal.evaluate.load.figures import Player
from diagonal.evaluate.simulation.arrivals import Crowd, Loss, Visit
from diagonal.evaluate.simulation.chunk_times import ChunkTimes, Draws
from diagonal.evaluate.simulation.clock import Calendar
from diagonal.evaluate.simulation.engine import EngineSetup, SimulatedEngine
from diagonal.evaluate.simulation.figures import Tally

Clock = Callable[[], float]
Told = tuple[float, float, float, float]  # of a replica: sessions, slots, busy share, refused of late
_LATELY_S = 10.0  # as `serve.replica.replica` counts refusals for autoscaling


class Ranking(Protocol):
    def order(self, told: Iterable[tuple[str, int, bool]], session: str, avoided: str = "") -> Iterator[str]: ...

    def assign(self, name: str) -> None: ...


class Playback(Protocol):
    def start(self, position_s: float = 0.0) -> None: ...

    def position_s(self) -> float: ...

    def wait_s(self, media_s: float) -> float: ...

    def arrived(self, media_s: float) -> float: ...


class Refusals(Protocol):
    def note(self, retry_after_s: float) -> None: ...

    def repeated_s(self) -> float | None: ...


@dataclass(frozen=True)
class Policies:
    """What the live service decides with. `scaling(told, target, now_s)` is how many replicas there are to be.

    A driver notices within `notice_s` that its replica is gone, tries others every `retry_s`, and gives up after
    `patience_s` without any replica, `full_patience_s` where all are full.
    """

    ranking: Callable[[Clock], Ranking]
    playback: Callable[[float, Clock], Playback]
    refusals: Callable[[Clock], Refusals]
    scaling: Callable[[Sequence[Told], int, float], int] | None
    notice_s: float
    retry_s: float
    patience_s: float
    full_patience_s: float


@dataclass(frozen=True)
class Fleet:
    """How many replicas there are at first, and how long one needs to be up; `drain_s` bounds one that goes."""

    replicas: int
    gateways: int = 1
    start_s: float = 60.0
    stats_every_s: float = 1.0
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("replicas", "gateways"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("start_s", "drain_s"):
            require(0 <= getattr(self, name) < inf, name, getattr(self, name), "seconds of at least 0")
        require(0 < self.stats_every_s < inf, "stats_every_s", self.stats_every_s, "seconds above 0")


@dataclass(eq=False, slots=True)
class Replica:
    name: str
    engine: SimulatedEngine
    up_s: float
    refused_at: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    viewers: dict[str, Viewer] = field(default_factory=dict)
    draining: bool = False
    counted_busy_s: float = 0.0


@dataclass(eq=False, slots=True)
class Viewer:
    """One session from outside: where it is, what came of it, and how far its viewer has played."""

    number: int
    name: str
    visit: Visit
    gateway: int
    clock: Playback
    player: Player
    pixel_frames: int | None
    replica: Replica | None = None
    chunk: int = 0
    media_s: float = 0.0
    seen_s: float | None = None
    changes: deque[float] = field(default_factory=deque)
    tries: int = 0
    over: bool = False


class SimulatedService:
    """Runs `visits` against a fleet; `run` gives what came of it."""

    def __init__(
        self,
        setup: EngineSetup,
        times: ChunkTimes,
        fleet: Fleet,
        crowd: Crowd,
        policies: Policies,
        visits: Sequence[Visit],
        seed: int = 0,
        losses: Sequence[Loss] = (),
        from_s: float = 0.0,
    ) -> None:
        self.calendar, self.tally = Calendar(), Tally(from_s)
        self._setup, self._times, self._fleet, self._crowd, self._policies = setup, times, fleet, crowd, policies
        self._draws, self._draw = Draws(times, seed), random.Random(seed)
        self._rankings = [policies.ranking(self.calendar) for _ in range(fleet.gateways)]
        self._refusals = [policies.refusals(self.calendar) for _ in range(fleet.gateways)]
        self._names = itertools.count()
        self._replicas: dict[str, Replica] = {}
        self._standings: dict[str, tuple[str, int, bool]] = {}
        self._starting = self._active = 0
        self._target = fleet.replicas
        self._visits = iter(visits)
        for _ in range(fleet.replicas):
            self._put_up()
        for loss in losses:
            self.calendar.at(loss.at_s, self._lose, loss.replicas)

    def run(self, last_s: float) -> Tally:
        """Let so much time pass."""
        self.calendar.every(self._fleet.stats_every_s, self._gather)
        self.calendar.every(1.0, self._note_second)
        self._await_next()
        self.calendar.run(last_s)
        for replica in self._replicas.values():
            for viewer in replica.viewers.values():
                self._count(viewer, "watching")
        return self.tally

    # Replicas

    def _put_up(self) -> None:
        name = f"replica-{next(self._names)}"
        engine = SimulatedEngine(self._setup, self._draws, self.calendar, partial(self._made, name))
        self._replicas[name] = Replica(name, engine, self.calendar.now_s)
        self._standings[name] = (name, 0, True)

    def _start_one(self) -> None:
        self._starting += 1
        self.calendar.after(self._fleet.start_s, self._started)

    def _started(self) -> None:
        self._starting -= 1
        if self._running + self._starting < self._target:
            self._put_up()

    @property
    def _running(self) -> int:
        return len(self._standings)

    def _lose(self, count: int) -> None:
        """The newest replicas are gone, as if they were on one node; others are started for them."""
        for replica in [self._replicas[name] for name in list(self._standings)[-count:]]:
            replica.engine.lost = True
            self._remove(replica)
            for viewer in list(replica.viewers.values()):
                self._notice(viewer, replica)
            self._start_one()

    def _drain(self, count: int) -> None:
        for replica in [self._replicas[name] for name in list(self._standings)[-count:]]:
            replica.draining = True
            del self._standings[replica.name]
            for viewer in list(replica.viewers.values()):
                self._notice(viewer, replica)
            self.calendar.after(self._fleet.drain_s, self._end_drain, replica)

    def _end_drain(self, replica: Replica) -> None:
        replica.engine.lost = True
        self._remove(replica)

    def _remove(self, replica: Replica) -> None:
        self._count_busy(replica)
        self._standings.pop(replica.name, None)
        self._replicas.pop(replica.name, None)

    def _gather(self) -> None:
        """What replicas tell routers, and the autoscaler, which then decides."""
        for name in self._standings:
            self._standings[name] = (name, self._replicas[name].engine.sessions, True)
        if self._policies.scaling is None:
            return
        since_s = self.calendar.now_s - _LATELY_S
        told = []
        for name in self._standings:
            one = self._replicas[name]
            refused = sum(at_s > since_s for at_s in one.refused_at)
            told.append((float(one.engine.sessions), float(one.engine.slots), one.engine.busy, float(refused)))
        wanted = self._policies.scaling(told, self._target, self.calendar.now_s)
        there = self._running + self._starting
        for _ in range(wanted - there):
            self._start_one()
        self._target = wanted
        if self._running > wanted:
            self._drain(self._running - wanted)

    def _note_second(self) -> None:
        tally, now_s = self.tally, self.calendar.now_s
        tally.peak = max(tally.peak, self._active)
        tally.viewers.append(self._active)
        tally.replicas.append(self._running)
        for replica in self._replicas.values():
            self._count_busy(replica)
        if now_s >= tally.from_s:
            tally.replica_s += len(self._replicas)
            tally.watched_s += self._active

    def _count_busy(self, replica: Replica) -> None:
        busy_s, replica.counted_busy_s = replica.engine.busy_s - replica.counted_busy_s, replica.engine.busy_s
        if self.calendar.now_s > self.tally.from_s:
            self.tally.busy_s += busy_s

    # Viewers

    def _await_next(self) -> None:
        visit = next(self._visits, None)
        if visit is not None:
            self.calendar.at(visit.at_s, self._arrive, visit)

    def _arrive(self, visit: Visit) -> None:
        self._await_next()
        number, frames = next(self._names), None
        if visit.asked:
            frames = max(1, round(visit.stay_s * self._setup.geometry.pixel_fps))
        clock = self._policies.playback(self._setup.lead_s, self.calendar)
        viewer = Viewer(
            number,
            f"video-{number}",
            visit,
            number % self._fleet.gateways,
            clock,
            Player(self._crowd.start_buffer_s),
            frames,
        )
        self._ask(viewer)

    def _ask(self, viewer: Viewer) -> None:
        viewer.tries += 1
        self.calendar.after(self._crowd.network_s + 2 * self._times.hop_s, self._open, viewer)

    def _open(self, viewer: Viewer) -> None:
        """At a gateway: refused as others just were, or by the replica that is asked, or admitted."""
        refusals = self._refusals[viewer.gateway]
        if (again_s := refusals.repeated_s()) is not None:
            return self._refuse(viewer, "lately", again_s)
        replica = self._route(viewer, "")
        if replica is None:
            return self._refuse(viewer, "no replica", 1.0)
        try:
            replica.engine.open(viewer.name, viewer.pixel_frames)
        except CapacityError as error:
            replica.refused_at.append(self.calendar.now_s)
            refusals.note(error.retry_after_s)
            return self._refuse(viewer, error.reason, error.retry_after_s)
        self._active += 1
        self._hold(viewer, replica)
        viewer.clock.start()
        if viewer.pixel_frames is None:
            self.calendar.at(viewer.visit.at_s + viewer.visit.stay_s, self._leave, viewer, "completed")

    def _route(self, viewer: Viewer, avoided: str) -> Replica | None:
        ranking = self._rankings[viewer.gateway]
        name = next(ranking.order(self._standings.values(), viewer.name, avoided), None)
        if name is None:
            return None
        ranking.assign(name)
        return self._replicas[name]

    def _refuse(self, viewer: Viewer, why: str, again_s: float) -> None:
        self.tally.refuse(viewer.visit.at_s, self.calendar.now_s, why)
        if viewer.tries <= self._crowd.retries:
            self.calendar.after(again_s, self._ask, viewer)
            return
        self._count(viewer, "rejected")

    def _hold(self, viewer: Viewer, replica: Replica) -> None:
        """The replica has the session and begins its next chunk."""
        viewer.replica = replica
        replica.viewers[viewer.name] = viewer
        replica.engine.request(viewer.name)

    def _made(self, replica: str, session: str, chunk: int, ready_s: float, changes: int) -> None:
        self.calendar.at(ready_s + self._times.hop_s, self._receive, replica, session, chunk, changes)

    def _receive(self, name: str, session: str, chunk: int, changes: int) -> None:
        """A chunk is at its driver, which keeps it, sends it on, and asks for the next one in time."""
        replica = self._replicas.get(name)
        viewer = replica.viewers.get(session) if replica is not None else None
        if replica is None or viewer is None or chunk != viewer.chunk:
            return  # its replica was lost before it was pulled, or the session is elsewhere, or over
        now_s, geometry = self.calendar.now_s, self._setup.geometry
        viewer.clock.arrived(viewer.media_s)
        frames = geometry.chunk_pixel_frames(chunk)
        if viewer.pixel_frames is not None:
            frames = min(frames, viewer.pixel_frames - geometry.pixel_start(chunk))
        media_s = frames / geometry.pixel_fps
        viewer.chunk, viewer.media_s = chunk + 1, viewer.media_s + media_s
        waited_s = self._see(viewer, now_s + self._times.deliver_s + self._crowd.network_s, media_s, changes)
        if viewer.pixel_frames is not None and viewer.chunk == geometry.chunks_for(viewer.pixel_frames):
            return self.calendar.after(self._times.deliver_s + self._times.hop_s, self._leave, viewer, "completed")
        if waited_s > viewer.visit.patience_s:
            return self._leave(viewer, "abandoned")
        turn_s = max(self._times.deliver_s, viewer.clock.wait_s(viewer.media_s))
        self.calendar.after(turn_s + self._times.hop_s, self._pull, viewer, replica)
        if self._crowd.change_every and chunk % self._crowd.change_every == 1:
            self.calendar.after(
                2 * self._crowd.network_s + self._times.deliver_s + 2 * self._times.hop_s, self._change, viewer
            )

    def _see(self, viewer: Viewer, at_s: float, media_s: float, changes: int) -> float:
        """A chunk is on its viewer's screen, or waits there; how long he had to wait for it."""
        tally, player = self.tally, viewer.player
        stalled_s, counts = player.stall_s, at_s >= self.tally.from_s
        player.arrived(at_s, media_s)
        waited_s = player.stall_s - stalled_s
        if waited_s > 0:
            tally.stall(viewer.number, at_s, waited_s)
        if viewer.seen_s is None:
            waited_s = at_s - viewer.visit.at_s
            if counts:
                tally.first_frame_s.append(waited_s)
        elif counts:
            tally.interval_s.append(at_s - viewer.seen_s)
        viewer.seen_s = at_s
        tally.media_s += media_s if counts else 0.0
        for _ in range(min(changes, len(viewer.changes))):
            sent_s = viewer.changes.popleft()
            if counts:
                tally.prompt_s.append(at_s - sent_s)
        return waited_s

    def _change(self, viewer: Viewer) -> None:
        if viewer.over or viewer.replica is None:
            return
        viewer.changes.append(self.calendar.now_s - self._crowd.network_s - 2 * self._times.hop_s)
        viewer.replica.engine.change(viewer.name, self._crowd.transition_chunks)

    def _pull(self, viewer: Viewer, replica: Replica) -> None:
        if viewer.replica is replica and not viewer.over:
            replica.engine.request(viewer.name)

    def _leave(self, viewer: Viewer, outcome: str) -> None:
        """A session ends: the stream is over, or its viewer has gone."""
        if viewer.over:
            return
        viewer.over = True
        self._active -= 1
        self._let_go(viewer)
        self._count(viewer, outcome)

    def _let_go(self, viewer: Viewer) -> None:
        if viewer.replica is not None:
            viewer.replica.viewers.pop(viewer.name, None)
            viewer.replica.engine.close(viewer.name)
            viewer.replica = None

    def _count(self, viewer: Viewer, outcome: str) -> None:
        if viewer.visit.at_s >= self.tally.from_s:
            self.tally.outcomes[outcome] += 1

    # Moves

    def _notice(self, viewer: Viewer, replica: Replica) -> None:
        """Its driver will see that the replica is gone, or drains, when it next looks."""
        wait_s = self._draw.uniform(0.0, self._policies.notice_s) + self._times.hop_s
        self.calendar.after(wait_s, self._move, viewer, replica, self.calendar.now_s + wait_s)

    def _move(self, viewer: Viewer, old: Replica, since_s: float) -> None:
        """Take the session up elsewhere, with the media that its viewer has left; again a little later if need be."""
        if viewer.over or viewer.replica is not old:
            return
        new, patience_s = self._route(viewer, old.name), self._policies.patience_s
        try:
            if new is None:
                raise CapacityError(0, self._policies.retry_s)
            if viewer.chunk:
                ahead_s = viewer.media_s - viewer.clock.position_s()
                new.engine.restore(viewer.name, viewer.pixel_frames, viewer.chunk, ahead_s)
            else:
                new.engine.open(viewer.name, viewer.pixel_frames)
        except CapacityError:
            if new is not None:
                new.refused_at.append(self.calendar.now_s)
                patience_s = max(patience_s, self._policies.full_patience_s)
            if self.calendar.now_s + self._policies.retry_s > since_s + patience_s:
                self.tally.stall(viewer.number, self.calendar.now_s, self._late_s(viewer))
                self._leave(viewer, "lost")
            else:
                self.calendar.after(self._policies.retry_s, self._move, viewer, old, since_s)
            return
        self._let_go(viewer)
        self.tally.moved += 1
        self._hold(viewer, new)

    def _late_s(self, viewer: Viewer) -> float:
        return max(0.0, viewer.clock.position_s() - viewer.media_s)
