"""One replica of a simulated service: the real admission, cost model and scheduler, and chunks that only take time.

What `diagonal.engine` does to a session, without a network: who is admitted and what a step costs is decided by the
same `Budget`, `demand_of` and `choose`; only the state of a session is kept here again, without its tensors.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

from diagonal.config import Config
from diagonal.engine.budget import (
    RECACHE_ONCE,
    Budget,
    CapacityError,
    ChunkKind,
    Demand,
    Progress,
    bounded_s,
    busy_share,
    demand_of,
    first_stable_chunk,
)
from diagonal.engine.scheduler import Candidate, choose
from diagonal.evaluate.simulation.chunk_times import Draws
from diagonal.evaluate.simulation.clock import Calendar
from diagonal.geometry import ChunkGeometry
from diagonal.schedule import StepSchedule


@dataclass(frozen=True)
class EngineSetup:
    """What a release's configuration says of its engines."""

    geometry: ChunkGeometry
    schedule: StepSchedule
    shorter: StepSchedule | None
    window_chunks: int
    slots: int
    batch_limit: int
    share: float
    lead_s: float
    encode_threads: int = 2

    @classmethod
    def of(cls, config: Config, encode_threads: int = 2) -> EngineSetup:
        serve, own = config.serve, config.schedule
        shorter = StepSchedule(serve.degraded_steps, own.shift, own.context) if serve.degraded_steps else None
        window = config.cache.window_frames // config.geometry.chunk_frames
        return cls(
            config.geometry,
            own,
            shorter,
            window,
            serve.max_sessions,
            serve.batch_sessions,
            serve.budget_share,
            serve.playout_lead_s,
            encode_threads,
        )


@dataclass(eq=False, slots=True)
class Stream:
    """One session at an engine: its progress, and why its next chunk needs a re-cache first."""

    name: str
    pixel_frames: int | None
    schedule: StepSchedule
    next_chunk: int = 0
    kept: int = 0
    started_s: float | None = None
    asked: bool = False
    stale: bool = False
    moving: int = 0
    pending: list[int] = field(default_factory=list)
    ended: bool = False

    def slack_s(self, geometry: ChunkGeometry, now_s: float) -> float:
        """Seconds until its viewer, who played each chunk as it came, runs out of media."""
        if self.started_s is None:
            return -inf
        return geometry.pixel_start(self.next_chunk) / geometry.pixel_fps - (now_s - self.started_s)


Deliver = Callable[[str, int, float, int], None]


class SimulatedEngine:
    """Sessions on one device. `deliver(session, chunk, at_s, changes)` is told of each chunk, encoded at that time,
    and how many prompt changes begin with it."""

    def __init__(self, setup: EngineSetup, draws: Draws, calendar: Calendar, deliver: Deliver) -> None:
        self._setup, self._draws, self._calendar, self._deliver = setup, draws, calendar, deliver
        self._geometry = setup.geometry
        self._budget = Budget(share=setup.share, batch_limit=setup.batch_limit)
        self._cost = self._budget.model
        self._streams: dict[str, Stream] = {}
        self._closing: set[str] = set()
        self._encoders = [0.0] * setup.encode_threads
        self._steps: dict[tuple[str, int, int], tuple[ChunkKind, Hashable]] = {}
        self._kinds: dict[Hashable, ChunkKind] = {}
        self._stepping = self.lost = False
        self.busy_s, self.chunks = 0.0, 0
        self._warm_up()

    @property
    def sessions(self) -> int:
        return len(self._streams)

    @property
    def slots(self) -> int:
        return self._setup.slots

    @property
    def busy(self) -> float:
        """The predicted share of its time that its playing sessions take, 1 being all that the budget allows."""
        return busy_share(self._cost, self._playing(), self._setup.batch_limit) / self._setup.share

    def open(self, name: str, pixel_frames: int | None) -> None:
        """Admit a new session, as `Engine.open` does; `CapacityError` or `BudgetError`."""
        progress = Progress(self._setup.schedule, 0, self._total(pixel_frames), remaining_s=self._whole_s(pixel_frames))
        schedule = self._admit(progress, self._setup.shorter)
        self._streams[name] = Stream(name, pixel_frames, schedule)

    def restore(self, name: str, pixel_frames: int | None, chunk: int, ahead_s: float) -> None:
        """Admit a session of another replica, as `Engine.restore` does: it re-caches first."""
        progress = Progress(self._setup.schedule, chunk, self._total(pixel_frames), RECACHE_ONCE)
        schedule = self._admit(progress, None)
        kept, geometry = min(chunk, self._setup.window_chunks - 1), self._geometry
        started_s = self._calendar.now_s - (geometry.pixel_start(chunk) / geometry.pixel_fps - ahead_s)
        self._streams[name] = Stream(name, pixel_frames, schedule, chunk, kept, started_s, stale=chunk > 0)

    def request(self, name: str) -> None:
        """Its next chunk is wanted; of an unknown session nothing is."""
        if stream := self._streams.get(name):
            stream.asked = True
            self._wake()

    def change(self, name: str, transition_chunks: int) -> None:
        """Its prompt changes with the next chunk."""
        if stream := self._streams.get(name):
            stream.pending.append(transition_chunks)

    def close(self, name: str) -> None:
        """Its slot is free at the next chunk boundary."""
        if name in self._streams:
            self._closing.add(name)
            if not self._stepping:
                self._settle()

    def _admit(self, progress: Progress, shorter: StepSchedule | None) -> StepSchedule:
        if len(self._streams) >= self._setup.slots:
            raise CapacityError(self._setup.slots, self._slot_free_s())
        return self._budget.schedule_of(
            self._playing(), lambda schedule: self._demand(schedule, progress), progress.schedule, shorter
        )

    def _demand(self, schedule: StepSchedule, progress: Progress) -> Demand:
        if schedule is not progress.schedule:
            progress = Progress(schedule, progress.next_chunk, progress.total_chunks, progress.recaches)
        return demand_of(progress, self._geometry, self._setup.window_chunks, self._cost)

    def _playing(self) -> list[Demand]:
        return [self._demand(one.schedule, self._progress(one)) for one in self._streams.values() if not one.ended]

    def _progress(self, stream: Stream) -> Progress:
        recaches = RECACHE_ONCE if stream.pending or stream.stale else 0.0
        if stream.moving or any(chunks > 1 for chunks in stream.pending):
            recaches = 1.0
        total, left_s = self._total(stream.pixel_frames), inf
        if stream.pixel_frames is not None:
            to_make = max(0, stream.pixel_frames - self._geometry.pixel_start(stream.next_chunk))
            ahead_s = 0.0 if stream.started_s is None else stream.slack_s(self._geometry, self._calendar.now_s)
            left_s = to_make / self._geometry.pixel_fps + max(0.0, ahead_s)
        return Progress(stream.schedule, stream.next_chunk, total, recaches, left_s)

    def _slot_free_s(self) -> float:
        over = (
            0.0 if one.ended or one.name in self._closing else self._progress(one).remaining_s
            for one in self._streams.values()
        )
        return bounded_s(min(over, default=0.0))

    def _total(self, pixel_frames: int | None) -> int | None:
        return None if pixel_frames is None else self._geometry.chunks_for(pixel_frames)

    def _whole_s(self, pixel_frames: int | None) -> float:
        return inf if pixel_frames is None else pixel_frames / self._geometry.pixel_fps

    def _wake(self) -> None:
        if not self._stepping and not self.lost:
            self._stepping = True  # others that ask at this very moment are in the same step, as behind the lock
            self._calendar.at(self._calendar.now_s, self._step)

    def _settle(self) -> None:
        for name in self._closing:
            self._streams.pop(name, None)
        self._closing.clear()

    def _step(self) -> None:
        """Choose a batch and let its time pass; idle where nobody asks."""
        self._settle()
        now_s = self._calendar.now_s
        asking = [one for one in self._streams.values() if one.asked and not one.ended]
        batch = choose([self._candidate(one, now_s) for one in asking], self._setup.batch_limit, self._step_s)
        if not batch or self.lost:
            self._stepping = False
            return
        streams = [self._streams[name] for name in batch]
        kind, _ = self._key(streams[0])
        recached, rebuilt, changes = 0, 0, []
        for stream in streams:
            stream.asked = False
            changes.append(len(stream.pending))
            again = self._prepare(stream)
            self._cost.observe_chunk(again > 0)
            recached, rebuilt = recached + again, rebuilt + stream.stale
            stream.stale = False
        times = self._draws.times
        step_s = self._draws.step_s(kind, len(streams))
        extra_s = recached * times.recache_chunk_s + rebuilt * times.rebuild_s
        told = (kind, len(streams), step_s + extra_s, recached, rebuilt > 0)
        self._calendar.after(step_s + extra_s, self._landed, streams, changes, told)

    def _prepare(self, stream: Stream) -> int:
        """Take its prompt changes in; the chunks to re-cache first."""
        due = bool(stream.pending) or stream.moving > 0 or stream.stale
        if stream.pending:
            stream.moving = stream.pending[-1]
            stream.pending.clear()
        stream.moving = max(0, stream.moving - 1)
        return stream.kept if due else 0

    def _measure(self, kind: ChunkKind, batch: int, took_s: float, recached: int, rebuilt: bool) -> None:
        """What the engine's own stopwatch tells its cost model."""
        if recached == 0:
            self._cost.observe(kind, batch, took_s)
        elif not rebuilt and (surplus_s := took_s - self._cost.step_s(kind, batch)) > 0:
            self._cost.observe_recache(recached, surplus_s)

    def _landed(
        self, streams: Sequence[Stream], changes: Sequence[int], told: tuple[ChunkKind, int, float, int, bool]
    ) -> None:
        """The batch is done: move its sessions on, hand their chunks to the encoders, and go on."""
        if self.lost:
            return
        now_s, geometry = self._calendar.now_s, self._geometry
        self.busy_s, self.chunks = self.busy_s + told[2], self.chunks + len(streams)
        self._measure(*told)
        for stream, changed in zip(streams, changes, strict=True):
            if stream.name in self._closing:
                continue
            chunk, waits = stream.next_chunk, stream.slack_s(geometry, now_s) < 0
            stream.next_chunk, stream.kept = chunk + 1, min(stream.kept + 1, self._setup.window_chunks - 1)
            if waits:
                stream.started_s = now_s - geometry.pixel_start(chunk) / geometry.pixel_fps
            stream.ended = stream.next_chunk == self._total(stream.pixel_frames)
            ready_s = max(now_s, self._encoders[0]) + self._draws.times.encode_s
            heapq.heapreplace(self._encoders, ready_s)
            self._deliver(stream.name, chunk, ready_s, changed)
        self._step()

    def _candidate(self, stream: Stream, now_s: float) -> Candidate:
        _, key = self._key(stream)
        due = stream.pending or stream.moving or stream.stale
        recache_s = self._cost.recache_s(stream.kept) if due else 0.0
        return Candidate(stream.name, stream.slack_s(self._geometry, now_s) - recache_s, key, True, recache_s)

    def _key(self, stream: Stream) -> tuple[ChunkKind, Hashable]:
        """What its next chunk costs depends on the first; sessions with equal second ones share forwards."""
        schedule = stream.schedule
        place = (schedule.steps, min(stream.next_chunk, len(schedule.rows)), stream.kept)
        found = self._steps.get(place)
        if found is None:
            kind = ChunkKind(schedule.forwards(stream.next_chunk), stream.kept)
            key = (schedule.levels(stream.next_chunk), schedule.resolved_context, stream.kept)
            found = self._steps[place] = kind, key
            self._kinds[key] = kind
        return found

    def _step_s(self, key: Hashable, sessions: int) -> float:
        return self._cost.step_s(self._kinds[key], sessions)

    def _warm_up(self) -> None:
        """What `Engine.warm_up` measures before the first session comes."""
        setup, draws = self._setup, self._draws
        largest = min(setup.batch_limit, setup.slots)
        for size in [*(size for size in (1, 2, 4, 8, 16, 32) if size < largest), largest]:
            for chunk in range(first_stable_chunk(setup.schedule, setup.window_chunks) + 1):
                kind = ChunkKind.of(setup.schedule, chunk, setup.window_chunks)
                self._cost.observe(kind, size, draws.median_s(kind, size))
        if draws.times.recache_chunk_s:
            self._cost.observe_recache(1, draws.times.recache_chunk_s)
