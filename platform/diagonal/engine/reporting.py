"""What an engine says of itself: a reading of its sessions and memory, and its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from diagonal.engine.admission import Admission
from diagonal.engine.session import Session
from diagonal.engine.session_table import SessionTable
from diagonal.geometry import ChunkGeometry
from diagonal.metrics import MetricsBackend, NullBackend
from diagonal.model.cache import KVPool


@dataclass(frozen=True)
class EngineStats:
    """A reading of the engine; `chunk_s` is the moving mean of a chunk's generation time, 0 before the first.

    `active_sessions` have a slot, `paused_sessions` do not. `busy` is the predicted busy time per second of media of
    the playing ones.
    """

    active_sessions: int
    free_slots: int
    cache_bytes: int
    cache_capacity_bytes: int
    chunk_s: float
    paused_sessions: int = 0
    state_bytes: int = 0
    snapshot_bytes: int = 0
    busy: float = 0.0


class EngineReport:
    """Reads the table, admission and pool of an engine, and sets its metrics, where there is somewhere to set them."""

    def __init__(self, metrics: MetricsBackend | None, table: SessionTable, admission: Admission, pool: KVPool) -> None:
        self.metrics, self._has_backend = metrics or NullBackend(), metrics is not None
        self._table, self._admission, self._pool = table, admission, pool
        self._chunk_s = 0.0

    def stats(self) -> EngineStats:
        """Sessions, slots, bytes and predicted load now."""
        with self._table.lock:
            live = self._table.live
            paused = [session for session in self._table.sessions.values() if not session.live]
            busy = self._admission.busy()
            state_bytes = sum(session.device_bytes() + session.latents.bytes for session in live)
        return EngineStats(
            len(live),
            self._admission.slots - len(live),
            self._pool.bytes_in_use,
            self._pool.capacity_bytes,
            self._chunk_s,
            len(paused),
            state_bytes,
            sum(session.latents.bytes for session in paused),
            busy,
        )

    def occupancy(self) -> None:
        """Set the gauges of sessions, memory and budget."""
        if not self._has_backend:
            return
        stats = self.stats()
        self.metrics.set("diagonal_sessions_active", stats.active_sessions)
        self.metrics.set("diagonal_sessions_paused", stats.paused_sessions)
        self.metrics.set("diagonal_kv_cache_bytes", stats.cache_bytes)
        self.metrics.set("diagonal_kv_cache_capacity_bytes", stats.cache_capacity_bytes)
        self.metrics.set("diagonal_session_state_bytes", stats.state_bytes)
        self.metrics.set("diagonal_snapshot_bytes", stats.snapshot_bytes)
        self.metrics.set("diagonal_budget_used_ratio", stats.busy)
        self.metrics.set("diagonal_budget_limit_ratio", self._admission.budget.share)

    def step(self, pixel_frames: int, busy_s: float, pixel_fps: float) -> None:
        """So many pixel frames came out of a step."""
        self.metrics.inc("diagonal_generation_busy_seconds_total", busy_s)
        self.metrics.inc("diagonal_generated_media_seconds_total", pixel_frames / pixel_fps)
        if pixel_frames and busy_s > 0:
            self.metrics.set("diagonal_generation_frames_per_second", pixel_frames / busy_s)
        self.occupancy()

    def chunk_time(self, seconds: float) -> None:
        """A chunk of a step took so long."""
        self._chunk_s = seconds if self._chunk_s == 0.0 else 0.9 * self._chunk_s + 0.1 * seconds

    def slack(self, session: Session, geometry: ChunkGeometry, now_s: float) -> None:
        """A chunk is made: what its viewer, if it has one who waits, still had to play."""
        if session.spec.paced and session.playback.zero_s is not None:
            slack_s = max(0.0, session.slack_s(geometry, now_s))
            self.metrics.observe("diagonal_playout_slack_seconds", slack_s)
