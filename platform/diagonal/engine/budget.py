"""Admission by measured real-time budget: what a chunk costs, what playing sessions need, who still fits. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

from diagonal.errors import require
from diagonal.geometry import ChunkGeometry
from diagonal.schedule import StepSchedule

SOONEST_S, LATEST_S = 1.0, 60.0  # bounds of "retry after"
RECACHE_ONCE = 0.25  # re-caches a chunk of a session that needs a single one: spread over four chunks, about its lead


class CapacityError(RuntimeError):
    """A session cannot be taken now; `retry_after_s` is when to ask again, `reason` is for metrics."""

    reason = "full"

    def __init__(self, sessions: int, retry_after_s: float) -> None:
        super().__init__(f"all {sessions} session slots are in use; retry after {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class BudgetError(CapacityError):
    """There is a slot, but no time: with this session the others would not be made as fast as they play."""

    reason = "budget"

    def __init__(self, busy: float, share: float, retry_after_s: float) -> None:
        RuntimeError.__init__(
            self, f"{busy:.2f} s of work per second of media, allowed is {share:g}; retry after {retry_after_s:g} s"
        )
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class ChunkKind:
    """What decides how long a chunk takes: its forwards, and the chunks of context that each of them reads."""

    forwards: int
    context_chunks: int

    @classmethod
    def of(cls, schedule: StepSchedule, chunk: int, window_chunks: int) -> ChunkKind:
        """Of a stream's chunk in the ordinary run, when nothing was dropped from its window."""
        return cls(schedule.forwards(chunk), min(chunk, window_chunks - 1))


class CostModel:
    """Measured seconds of a step by chunk kind and batch size, and of a re-cache by chunk; exponentially averaged."""

    def __init__(self, smoothing: float = 0.2) -> None:
        require(0.0 < smoothing <= 1.0, "smoothing", smoothing, "a number in (0, 1]")
        self._smoothing = smoothing
        self._steps: dict[tuple[ChunkKind, int], float] = {}
        self._recache_s: float | None = None
        self.recaches_per_chunk = 0.0

    def copy_from(self, other: CostModel) -> None:
        """Start from what was measured elsewhere."""
        self._steps, self._recache_s = dict(other._steps), other._recache_s

    def observe(self, kind: ChunkKind, batch: int, seconds: float) -> None:
        """One step made chunks of one kind for `batch` sessions."""
        known = self._steps.get((kind, batch))
        self._steps[kind, batch] = seconds if known is None else known + self._smoothing * (seconds - known)

    def observe_recache(self, chunks: int, seconds: float) -> None:
        """Writing `chunks` chunks of one session's cache anew took so long."""
        each, known = seconds / chunks, self._recache_s
        self._recache_s = each if known is None else known + self._smoothing * (each - known)

    def observe_chunk(self, recached: bool, smoothing: float = 0.02) -> None:
        """A playing session's chunk was made, with or without a re-cache before it: how often, on average."""
        self.recaches_per_chunk += smoothing * (recached - self.recaches_per_chunk)

    def step_s(self, kind: ChunkKind, batch: int) -> float:
        """Seconds of a step; where it was never measured, no less than what was measured tells; 0 knowing nothing."""
        exact = self._steps.get((kind, batch))
        if exact is not None:
            return exact
        bounds: dict[ChunkKind, float] = {}
        for (other, size), seconds in self._steps.items():
            bounds[other] = min(bounds.get(other, inf), _scaled(seconds, size, batch))
        if kind in bounds:
            return bounds[kind]
        return max((bound * kind.forwards / other.forwards for other, bound in bounds.items()), default=0.0)

    def recache_s(self, chunks: int) -> float:
        """Seconds of a re-cache of so many chunks."""
        return (self._recache_s or 0.0) * chunks


def _scaled(seconds: float, measured: int, batch: int) -> float:
    """An upper bound: a smaller batch is no slower, a larger one at worst one after the other."""
    return seconds * max(1.0, batch / measured)


@dataclass(frozen=True)
class Demand:
    """What one playing session needs: chunks of a kind, one every `media_s`, and re-caches between them.

    Sessions with equal keys can share a forward. `remaining_s` is when it is expected to end.
    """

    key: Hashable
    kind: ChunkKind
    media_s: float
    recaches_per_chunk: float = 0.0
    recache_chunks: int = 0
    remaining_s: float = inf


@dataclass(frozen=True)
class Progress:
    """Where a session stands, as far as its demand depends on it. `recaches` are those that it is known to need, by
    chunk: one each during a prompt transition."""

    schedule: StepSchedule
    next_chunk: int = 0
    total_chunks: int | None = None
    recaches: float = 0.0
    remaining_s: float = inf


def first_stable_chunk(schedule: StepSchedule, window_chunks: int) -> int:
    """The first chunk after which all are of one kind: the window is full and the schedule's row repeats."""
    rows = schedule.rows
    changes = [index for index in range(1, len(rows)) if rows[index] != rows[index - 1]]
    return max(1, window_chunks - 1, *changes)


def demand_of(progress: Progress, geometry: ChunkGeometry, window_chunks: int, model: CostModel) -> Demand:
    """The demand of the costliest kind of chunk still to come: a session in its first chunks is charged for them."""
    first = progress.next_chunk
    last = max(first, first_stable_chunk(progress.schedule, window_chunks))
    if progress.total_chunks is not None:
        last = max(first, min(last, progress.total_chunks - 1))

    def rate(chunk: int) -> float:
        return model.step_s(ChunkKind.of(progress.schedule, chunk, window_chunks), 1) / geometry.chunk_media_s(chunk)

    chunk = max(range(first, last + 1), key=lambda c: (rate(c), c))
    kind = ChunkKind.of(progress.schedule, chunk, window_chunks)
    key = (progress.schedule.levels(chunk), progress.schedule.context_of(chunk), kind.context_chunks)
    recaches = max(progress.recaches, model.recaches_per_chunk)
    return Demand(key, kind, geometry.chunk_media_s(chunk), recaches, window_chunks - 1, progress.remaining_s)


def busy_share(model: CostModel, demands: Sequence[Demand], batch_limit: int) -> float:
    """Predicted busy seconds per second of media: full batches of equal key, the rest of each, and the re-caches."""
    busy = 0.0
    for (_, kind, media_s), sessions in Counter((d.key, d.kind, d.media_s) for d in demands).items():
        full, rest = divmod(sessions, batch_limit)
        batches = full * model.step_s(kind, batch_limit) + (model.step_s(kind, rest) if rest else 0.0)
        busy += batches / media_s
    return busy + sum(d.recaches_per_chunk * model.recache_s(d.recache_chunks) / d.media_s for d in demands)


@dataclass(frozen=True)
class Budget:
    """The rule of admission: busy time per second of media stays under `share`."""

    model: CostModel = field(default_factory=CostModel)
    share: float = 0.9
    batch_limit: int = 1

    def fits(self, playing: Sequence[Demand], wanted: Demand) -> bool:
        """Whether everybody is still made in time; an engine without playing sessions takes any."""
        return not playing or busy_share(self.model, [*playing, wanted], self.batch_limit) <= self.share

    def admit(self, playing: Sequence[Demand], wanted: Demand) -> None:
        """`BudgetError` when the session does not fit."""
        if not self.fits(playing, wanted):
            busy = busy_share(self.model, [*playing, wanted], self.batch_limit)
            raise BudgetError(busy, self.share, self.retry_after_s(playing, wanted))

    def schedule_of(
        self,
        playing: Sequence[Demand],
        demand: Callable[[StepSchedule], Demand],
        own: StepSchedule,
        shorter: StepSchedule | None = None,
    ) -> StepSchedule:
        """What a new session is to run: its own schedule, or the shorter one where only that fits; `BudgetError`."""
        wanted = demand(own)
        if shorter is not None and not self.fits(playing, wanted) and self.fits(playing, demand(shorter)):
            return shorter
        self.admit(playing, wanted)
        return own

    def retry_after_s(self, playing: Sequence[Demand], wanted: Demand) -> float:
        """When enough playing sessions are expected to have ended, in 1 to 60 s; 60 when none is expected to."""
        for end_s in sorted({demand.remaining_s for demand in playing}):
            if self.fits([demand for demand in playing if demand.remaining_s > end_s], wanted):
                return bounded_s(end_s)
        return LATEST_S


def bounded_s(seconds: float) -> float:
    """A time to retry after, in 1 to 60 s."""
    return min(LATEST_S, max(SOONEST_S, seconds))
