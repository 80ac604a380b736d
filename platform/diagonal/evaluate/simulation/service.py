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

from diagonal.config import Config
from diagonal.engine.budget import CapacityError, CostModel
from diagonal.engine.session import ChunkResult
from diagonal.engine.snapshot import Snapshot
from diagonal.errors import require
from diagonal.evaluate.load.figures import Player
from diagonal.evaluate.simulation.arrivals import ArrivalProcess, Loss, SessionRequest
from diagonal.evaluate.simulation.chunk_times import ChunkTimes, Draws
from diagonal.evaluate.simulation.clock import Calendar
from diagonal.evaluate.simulation.figures import Counters
from diagonal.evaluate.simulation.maker import simulated_config
from diagonal.evaluate.simulation.replica import SimulatedReplica

Clock = Callable[[], float]
ReplicaLoad = tuple[float, float, float, float]  # sessions, slots, busy share, refusals of late


class Ranking(Protocol):
    def order(self, replicas: Iterable[tuple[str, int, bool]], session: str, avoided: str = "") -> Iterator[str]: ...

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
    scaling: Callable[[Sequence[ReplicaLoad], int, float], int] | None
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
class Viewer:
    """One session from outside: where it is, what came of it, and how far its viewer has played."""

    number: int
    name: str
    request: SessionRequest
    gateway: int
    clock: Playback
    player: Player
    pixel_frames: int | None
    replica: SimulatedReplica | None = None
    snapshot: Snapshot | None = None
    chunk: int = 0
    media_s: float = 0.0
    seen_s: float | None = None
    changes: deque[float] = field(default_factory=deque)
    tries: int = 0


class SimulatedService:
    """Runs session requests against a fleet; `run` gives what came of them."""

    def __init__(
        self,
        config: Config,
        times: ChunkTimes,
        fleet: Fleet,
        arrivals: ArrivalProcess,
        policies: Policies,
        requests: Sequence[SessionRequest],
        seed: int = 0,
        losses: Sequence[Loss] = (),
        from_s: float = 0.0,
    ) -> None:
        self.calendar, self.counters = Calendar(), Counters(from_s)
        self._config, self._times, self._fleet = simulated_config(config), times, fleet
        self._geometry, self._lead_s = config.geometry, config.serve.playout_lead_s
        self._arrivals, self._policies = arrivals, policies
        self._draws, self._draw = Draws(times, seed), random.Random(seed)
        self._rankings = [policies.ranking(self.calendar) for _ in range(fleet.gateways)]
        self._refusals = [policies.refusals(self.calendar) for _ in range(fleet.gateways)]
        self._numbers = itertools.count()
        self._replicas: dict[str, SimulatedReplica] = {}
        self._routed: dict[str, tuple[str, int, bool]] = {}  # of replicas that take sessions: what routers know
        self._active: dict[str, Viewer] = {}
        self._measured: CostModel | None = None  # as the first replica's warm-up measured them
        self._starting, self._target = 0, fleet.replicas
        self._requests = iter(requests)
        for _ in range(fleet.replicas):
            self._add_replica()
        for loss in losses:
            self.calendar.at(loss.at_s, self._lose, loss.replicas)

    def run(self, last_s: float) -> Counters:
        """Let so much time pass."""
        self.calendar.every(self._fleet.stats_every_s, self._gather)
        self.calendar.every(1.0, self._note_second)
        self._await_next()
        self.calendar.run(last_s)
        for viewer in self._active.values():
            self._count(viewer, "watching")
        return self.counters

    # Replicas

    def _add_replica(self) -> None:
        name = f"replica-{next(self._numbers)}"
        deliver = partial(self._deliver, name)
        replica = SimulatedReplica(name, self._config, self._draws, self.calendar, deliver, self._measured)
        if self._measured is None:
            self._measured = CostModel()
            self._measured.copy_from(replica.engine.admission.cost)
        self._replicas[name] = replica
        self._routed[name] = (name, 0, True)

    def _start_replica(self) -> None:
        self._starting += 1
        self.calendar.after(self._fleet.start_s, self._replica_started)

    def _replica_started(self) -> None:
        self._starting -= 1
        if len(self._routed) + self._starting < self._target:
            self._add_replica()

    def _lose(self, count: int) -> None:
        """The newest replicas are gone, as if they were on one node; others are started for them."""
        for name in list(self._routed)[-count:]:
            replica = self._replicas[name]
            self._remove(replica)
            self._notice_all(replica)
            self._start_replica()

    def _drain(self, count: int) -> None:
        for name in list(self._routed)[-count:]:
            replica = self._replicas[name]
            del self._routed[name]
            self._notice_all(replica)
            self.calendar.after(self._fleet.drain_s, self._remove, replica)

    def _remove(self, replica: SimulatedReplica) -> None:
        replica.lost = True
        self._count_busy(replica)
        self._routed.pop(replica.name, None)
        self._replicas.pop(replica.name, None)

    def _gather(self) -> None:
        """What replicas tell routers, and the autoscaler, which then decides."""
        for name in self._routed:
            self._routed[name] = (name, self._replicas[name].sessions, True)
        if self._policies.scaling is None:
            return
        loads = [self._replicas[name].load() for name in self._routed]
        self._target = self._policies.scaling(loads, self._target, self.calendar.now_s)
        for _ in range(self._target - len(self._routed) - self._starting):
            self._start_replica()
        if len(self._routed) > self._target:
            self._drain(len(self._routed) - self._target)

    def _note_second(self) -> None:
        self.counters.second(len(self._active), len(self._routed))
        for replica in self._replicas.values():
            self._count_busy(replica)
        if self.calendar.now_s >= self.counters.from_s:
            self.counters.replica_s += len(self._replicas)
            self.counters.watched_s += len(self._active)

    def _count_busy(self, replica: SimulatedReplica) -> None:
        busy_s = replica.take_busy_s()
        if self.calendar.now_s > self.counters.from_s:
            self.counters.busy_s += busy_s

    # Viewers

    def _await_next(self) -> None:
        request = next(self._requests, None)
        if request is not None:
            self.calendar.at(request.at_s, self._arrive, request)

    def _arrive(self, request: SessionRequest) -> None:
        self._await_next()
        number, frames = next(self._numbers), None
        if request.asked:
            frames = max(1, round(request.stay_s * self._geometry.pixel_fps))
        clock = self._policies.playback(self._lead_s, self.calendar)
        player, gateway = Player(self._arrivals.start_buffer_s), number % self._fleet.gateways
        self._ask(Viewer(number, f"video-{number}", request, gateway, clock, player, frames))

    def _ask(self, viewer: Viewer) -> None:
        viewer.tries += 1
        self.calendar.after(self._arrivals.network_s + 2 * self._times.hop_s, self._open, viewer)

    def _open(self, viewer: Viewer) -> None:
        """At a gateway: refused as others just were, or by the replica that is asked, or admitted."""
        refusals = self._refusals[viewer.gateway]
        if (again_s := refusals.repeated_s()) is not None:
            return self._refuse(viewer, "lately", again_s)
        replica = self._route(viewer, "")
        if replica is None:
            return self._refuse(viewer, "no replica", 1.0)
        try:
            replica.open(viewer.name, viewer.pixel_frames)
        except CapacityError as error:
            refusals.note(error.retry_after_s)
            return self._refuse(viewer, error.reason, error.retry_after_s)
        self._active[viewer.name] = viewer
        self._place(viewer, replica)
        viewer.clock.start()
        if viewer.pixel_frames is None:
            self.calendar.at(viewer.request.at_s + viewer.request.stay_s, self._leave, viewer, "completed")

    def _route(self, viewer: Viewer, avoided: str) -> SimulatedReplica | None:
        ranking = self._rankings[viewer.gateway]
        name = next(ranking.order(self._routed.values(), viewer.name, avoided), None)
        if name is None:
            return None
        ranking.assign(name)
        return self._replicas[name]

    def _refuse(self, viewer: Viewer, why: str, again_s: float) -> None:
        self.counters.refuse(viewer.request.at_s, self.calendar.now_s, why)
        if viewer.tries <= self._arrivals.retries:
            self.calendar.after(again_s, self._ask, viewer)
            return
        self._count(viewer, "rejected")

    def _place(self, viewer: Viewer, replica: SimulatedReplica) -> None:
        """The replica has the session and begins its next chunk."""
        viewer.replica = replica
        replica.request(viewer.name)

    def _deliver(self, replica: str, result: ChunkResult, ready_s: float) -> None:
        self.calendar.at(ready_s + self._times.hop_s, self._receive, replica, result)

    def _receive(self, name: str, result: ChunkResult) -> None:
        """A chunk is at its driver, which keeps it, sends it on, and asks for the next one in time."""
        replica, viewer = self._replicas.get(name), self._active.get(result.session_id)
        chunk, hop_s, deliver_s = result.chunk, self._times.hop_s, self._times.deliver_s
        if replica is None or viewer is None or viewer.replica is not replica or chunk != viewer.chunk:
            return  # its replica was lost before it was pulled, or the session is elsewhere, or over
        viewer.clock.arrived(viewer.media_s)
        frames = self._geometry.chunk_pixel_frames(chunk)
        if viewer.pixel_frames is not None:
            frames = min(frames, viewer.pixel_frames - self._geometry.pixel_start(chunk))
        media_s = frames / self._geometry.pixel_fps
        viewer.chunk, viewer.media_s, viewer.snapshot = chunk + 1, viewer.media_s + media_s, result.snapshot
        at_s = self.calendar.now_s + deliver_s + self._arrivals.network_s
        waited_s = self._see(viewer, at_s, media_s, len(result.applied_event_ids))
        if result.last:
            return self.calendar.after(deliver_s + hop_s, self._leave, viewer, "completed")
        if waited_s > viewer.request.patience_s:
            return self._leave(viewer, "abandoned")
        turn_s = max(deliver_s, viewer.clock.wait_s(viewer.media_s))
        self.calendar.after(turn_s + hop_s, self._pull, viewer, replica)
        if self._arrivals.change_every and chunk % self._arrivals.change_every == 1:
            self.calendar.after(2 * self._arrivals.network_s + deliver_s + 2 * hop_s, self._change, viewer)

    def _see(self, viewer: Viewer, at_s: float, media_s: float, changes: int) -> float:
        """A chunk is on its viewer's screen, or waits there; how long he had to wait for it."""
        counters, player = self.counters, viewer.player
        stalled_s, counts = player.stall_s, at_s >= counters.from_s
        player.arrived(at_s, media_s)
        waited_s = player.stall_s - stalled_s
        if waited_s > 0:
            counters.stall(viewer.number, at_s, waited_s)
        if viewer.seen_s is None:
            waited_s = at_s - viewer.request.at_s
        if counts:
            times = counters.first_frame_s if viewer.seen_s is None else counters.interval_s
            times.append(waited_s if viewer.seen_s is None else at_s - viewer.seen_s)
            counters.media_s += media_s
        viewer.seen_s = at_s
        for _ in range(min(changes, len(viewer.changes))):
            sent_s = viewer.changes.popleft()
            if counts:
                counters.prompt_s.append(at_s - sent_s)
        return waited_s

    def _change(self, viewer: Viewer) -> None:
        if viewer.replica is not None:
            viewer.changes.append(self.calendar.now_s - self._arrivals.network_s - 2 * self._times.hop_s)
            viewer.replica.change(viewer.name, self._arrivals.transition_chunks)

    def _pull(self, viewer: Viewer, replica: SimulatedReplica) -> None:
        if viewer.replica is replica:
            replica.request(viewer.name)

    def _leave(self, viewer: Viewer, outcome: str) -> None:
        """A session ends: the stream is over, or its viewer has gone."""
        if self._active.pop(viewer.name, None) is not None:
            self._release(viewer)
            self._count(viewer, outcome)

    def _release(self, viewer: Viewer) -> None:
        if viewer.replica is not None:
            viewer.replica.close(viewer.name)
            viewer.replica = None

    def _count(self, viewer: Viewer, outcome: str) -> None:
        if viewer.request.at_s >= self.counters.from_s:
            self.counters.outcomes[outcome] += 1

    # Moves

    def _notice_all(self, replica: SimulatedReplica) -> None:
        """Its sessions' drivers will see that the replica is gone, or drains, when they next look."""
        for viewer in [one for one in self._active.values() if one.replica is replica]:
            wait_s = self._draw.uniform(0.0, self._policies.notice_s) + self._times.hop_s
            self.calendar.after(wait_s, self._move, viewer, replica, self.calendar.now_s + wait_s)

    def _move(self, viewer: Viewer, old: SimulatedReplica, since_s: float) -> None:
        """Continue the session elsewhere, with the media that its viewer has left; again a little later if need be."""
        if viewer.replica is not old:
            return
        new, patience_s, retry_s = self._route(viewer, old.name), self._policies.patience_s, self._policies.retry_s
        try:
            if new is None:
                raise CapacityError(0, retry_s)
            ahead_s = viewer.media_s - viewer.clock.position_s()
            new.open(viewer.name, viewer.pixel_frames, viewer.snapshot, ahead_s)
        except CapacityError:
            now_s = self.calendar.now_s
            if new is not None:
                patience_s = max(patience_s, self._policies.full_patience_s)
            if now_s + retry_s > since_s + patience_s:
                late_s = max(0.0, viewer.clock.position_s() - viewer.media_s)
                self.counters.stall(viewer.number, now_s, late_s)
                self._leave(viewer, "lost")
            else:
                self.calendar.after(retry_s, self._move, viewer, old, since_s)
            return
        self._release(viewer)
        self.counters.moved += 1
        self._place(viewer, new)
