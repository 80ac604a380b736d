"""The engine replica: one device, one engine, the sessions that live there, and an encoder for each.

The engine runs on its own thread and encoding on others; the event loop only waits. Gateways pull what is there,
chunk after chunk. A chunk that was made is kept until the next one is asked for, so that a call can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ray import serve

from diagonal.engine.engine import CapacityError
from diagonal.engine.session import ChunkResult, IllegalMoveError, PromptChange, SessionSpec
from diagonal.engine.snapshot import SnapshotError, merged
from diagonal.errors import FieldError
from diagonal.media.encode import ChunkEncoder, Pixels
from diagonal.metrics import MetricsBackend
from serve.policies.autoscaling import BUSY, REFUSED, SESSIONS, SLOTS
from serve.provenance.watermarks import Watermarks
from serve.ray_metrics import serve_metrics
from serve.records import EncodedChunk, ModelInfo, Opened, OpenSession, Refused
from serve.replica.encoder_pool import SpareEncoders
from serve.replica.engine_thread import TICK_S, EngineThread
from serve.replica.loading import Loaded, describe, load_engine
from serve.replica.session_buffer import Slot
from serve.settings import ServeSettings
from serve.tracing import SessionTrace, traces_of

_LOG = logging.getLogger("ray.serve")
_REAP_EVERY_S = TICK_S
_PROOF_AGE_S = 5.0  # a readiness check wants a chunk that is not older, and has one made if there is none
_LOOK_EVERY_S = 0.02
_LATELY_S = 10.0  # so long a refused session counts as one that more replicas would take
_LOOK_AT_HEALTH_S = 0.25  # how soon who waits for a chunk is told that the engine hangs
_PULL_WAIT_S = 60.0
_TOGETHER, _LINGER_S = 3, 0.25  # a pull of several waits so long for so many: fewer calls cost all parts less
UNKNOWN = Refused("session_lost", "this replica does not hold the session")
LATE = Refused(
    "replica_late", "the machine is busy and chunks come late; try again later", retry_after_s=2.0, reason="late"
)
UNWELL = Refused("replica_unwell", "a part of the service makes no chunks now; try again", retry_after_s=2.0)


class Replica:
    """Made inside an event loop. `load` gives the engine; another one is passed in by tests."""

    def __init__(
        self,
        settings: ServeSettings,
        load: Callable[[ServeSettings, MetricsBackend], tuple[Any, ...]] = load_engine,
        metrics: MetricsBackend | None = None,
        name: str | None = None,
    ) -> None:
        self._settings = settings
        self._metrics, self._traces = metrics or serve_metrics(), traces_of(settings, "replica")
        self._name = name or str(serve.get_replica_context().replica_id.unique_id)
        loaded = Loaded(*load(settings, self._metrics))
        self._config, self._engine, self._count_tokens = loaded.config, loaded.engine, loaded.count_tokens
        self._marks = Watermarks.from_settings(settings, self._config.geometry)
        self._info = describe(loaded, self._marks)
        self._loop = asyncio.get_running_loop()
        self._slots: dict[str, Slot] = {}
        self._was_late = False
        self._refused_at: deque[float] = deque(maxlen=1000)
        self._pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
        self._urgent = ThreadPoolExecutor(1, thread_name_prefix="urgent")  # waits for no other's encoding
        geometry = self._config.geometry
        self._encoders = SpareEncoders(
            self._new_encoder, self._info.scales[0], self._config.serve.max_sessions, self._pool
        )
        self._thread = EngineThread(self._engine, self._deliver, geometry.chunk_media_s(1))
        self._thread.start()
        self._reaper = self._loop.create_task(self._reap())
        self._report_slots()

    async def describe(self) -> ModelInfo:
        return self._info

    async def open(self, request: OpenSession) -> Opened | Refused:
        """Hold a session and begin its first chunk."""
        refused = self._admit(lambda: self._engine.open(_spec(request)))
        if refused is not None:
            return refused
        opened = self._hold(request.video_id, Slot(self._encoders.take(request.scale)), 0, request.traceparent)
        return replace(opened, prompt_tokens=self._count_tokens(request.prompt) if self._count_tokens else None)

    async def check_room(self, request: OpenSession) -> Refused | None:
        """What `open` would refuse now; nothing changes."""
        return self._admit(lambda: self._engine.check_room(_spec(request)))

    async def restore(
        self, parts: Sequence[bytes], scale: int, ahead_s: float | None = None, traceparent: str = ""
    ) -> Opened | Refused:
        """Go on with a session of another replica after the newest of its snapshots (`snapshot`), oldest part first.

        `ahead_s` is the media that its viewer has left now. The answer is that of `open`; the next chunk is begun.
        """
        try:
            snapshot = await self._loop.run_in_executor(self._urgent, merged, parts)
        except SnapshotError as error:
            return Refused("snapshot_refused", str(error))
        refused = self._admit(lambda: self._engine.restore(snapshot, ahead_s))
        if refused is not None:
            return refused
        media = snapshot.media
        slot = Slot(self._encoders.take(scale, media.pixel_frames, media.chunks + 1))
        slot.wanted = slot.made = snapshot.next_chunk - 1
        slot.snapshots[slot.made] = snapshot
        return self._hold(snapshot.spec.session_id, slot, snapshot.next_chunk, traceparent)

    def _admit(self, enter: Callable[[], None]) -> Refused | None:
        """Let the engine take a session; what it refused."""
        if not self._thread.healthy:
            return UNWELL if self._thread.lost else LATE
        try:
            enter()
        except CapacityError as error:
            self._refused_at.append(time.monotonic())
            message = "every session slot is in use; try again later"
            if error.reason == "budget":
                message = "with one more session the others would no longer play smoothly; try again later"
            return Refused("server_full", message, retry_after_s=error.retry_after_s, reason=error.reason)
        except SnapshotError as error:
            return Refused("snapshot_refused", str(error))
        except FieldError as error:
            return Refused("invalid_value", f"{error.field}: allowed is {error.allowed}", error.field)
        return None

    def _hold(self, video_id: str, slot: Slot, chunk: int, traceparent: str) -> Opened:
        self._slots[video_id] = slot
        slot.trace = SessionTrace(self._traces, traceparent)
        slot.mark = self._marks.of(video_id, slot.encoder.scale)
        slot.task = self._loop.create_task(self._encode(video_id, slot))
        self._want(video_id, slot, chunk)
        self._report_slots()
        return Opened(self._name, slot.encoder.mime, slot.encoder.init_segment())

    async def pull(
        self, video_id: str, chunk: int, ahead: int = 0, since_chunk: int | None = None, wait_s: float = _PULL_WAIT_S
    ) -> tuple[EncodedChunk, ...] | Refused | None:
        """A chunk, made if it is not there. `ahead` more are begun; those that are there soon come along, in order.

        Chunks before it are given up. With `since_chunk` the newest of them brings what `restore` needs to go on after
        it: all (-1), or what came after that chunk.
        None: it is not made within `wait_s`; LATE where the engine's step is late, too. An engine that is lost is told
        at once.
        """
        slot = self._slots.get(video_id)
        if slot is None:
            return UNKNOWN
        slot.asked_at = time.monotonic()
        slot.give_up_before(chunk)
        if chunk <= slot.made and chunk not in slot.chunks:
            return Refused("chunk_gone", f"chunk {chunk} was given up")
        future = slot.chunk(chunk)
        self._want(video_id, slot, chunk + ahead)
        made = await self._made(future, wait_s)
        slot.asked_at = time.monotonic()
        if not isinstance(made, EncodedChunk):
            return made
        if chunk > 0 and ahead > 0:  # the first one is waited for
            await self._linger(slot, made)
        found = slot.ready(chunk, ahead)
        state = slot.snapshots.get(found[-1].chunk)
        if since_chunk is None or state is None:
            return found
        snapshot = await self._loop.run_in_executor(self._urgent, state.to_bytes, since_chunk)
        return (*found[:-1], replace(found[-1], snapshot=snapshot))

    async def _linger(self, slot: Slot, first: EncodedChunk) -> None:
        """Wait a little for the chunks behind that one."""
        late_s, made = time.monotonic() + _LINGER_S, first
        while not made.last and made.chunk < first.chunk + _TOGETHER - 1:
            done, _ = await asyncio.wait({slot.chunk(made.chunk + 1)}, timeout=max(0.0, late_s - time.monotonic()))
            following = done.pop().result() if done else None
            if not isinstance(following, EncodedChunk):
                return
            made = following

    async def _made(
        self, future: asyncio.Future[EncodedChunk | Refused], wait_s: float
    ) -> EncodedChunk | Refused | None:
        """The chunk when it is there; None when that takes too long, LATE when the engine's step does."""
        late_s = time.monotonic() + wait_s
        while (left_s := late_s - time.monotonic()) > 0 and not future.done():
            await asyncio.wait({future}, timeout=min(left_s, _LOOK_AT_HEALTH_S))
            if not future.done() and self._thread.lost:
                return UNWELL
        if future.done():
            return future.result()
        return LATE if self._thread.late else None

    async def holds(self, video_id: str, replica_name: str) -> bool:
        """Whether this is that replica, has the session, and its engine is not lost: else it is to be moved."""
        slot = self._slots.get(video_id)
        if slot is None or replica_name != self._name or self._thread.lost:
            return False
        slot.asked_at = time.monotonic()
        return True

    async def interact(self, video_id: str, event_id: str, prompt: str, transition_chunks: int) -> Refused | None:
        """Change the prompt from the next chunk on."""
        slot = self._slots.get(video_id)
        if slot is None:
            return UNKNOWN
        if slot.over:
            return Refused("session_over", "the session's last chunk is made")
        try:
            self._engine.interact(video_id, PromptChange(event_id, prompt, transition_chunks))
        except KeyError:
            return UNKNOWN
        except FieldError as error:
            return Refused("invalid_value", f"{error.field}: allowed is {error.allowed}", error.field)
        slot.changed_at[event_id] = time.monotonic()
        return None

    async def recording(self, video_id: str) -> str | Refused:
        """The log of a recorded session up to its newest chunk, for `jobs/replay.py`."""
        try:
            return self._engine.recording(video_id).to_json()
        except KeyError:
            return UNKNOWN
        except FieldError as error:
            return Refused("no_recording", f"{error.field}: allowed is {error.allowed}")

    async def pause(self, video_id: str) -> Refused | None:
        """Free the session's cache at the next chunk boundary; chunks asked for come once it is resumed."""
        refused = self._told(video_id, self._engine.pause)
        if refused is None:
            self._slots[video_id].paused_at = time.monotonic()
        return refused

    async def resume(self, video_id: str) -> Refused | None:
        """Go on with a paused session; `server_full` with when to ask again where there is no room for it."""
        refused = self._told(video_id, self._engine.resume)
        if refused is None:
            slot = self._slots[video_id]
            slot.paused_at, slot.asked_at = None, time.monotonic()
        return refused

    def _told(self, video_id: str, tell: Callable[[str], None]) -> Refused | None:
        if video_id not in self._slots:
            return UNKNOWN
        try:
            refused = self._admit(lambda: tell(video_id))
        except KeyError:
            return UNKNOWN
        except IllegalMoveError as error:
            return Refused("session_over", str(error))
        self._thread.wake()
        return refused

    async def close(self, video_id: str, outcome: str, replica_name: str = "") -> None:
        """Free the session's slot within one chunk; unknown ids are ignored.

        With `replica_name` that replica alone does it: a call for one that is gone reaches another, which may have it.
        """
        if replica_name not in ("", self._name):
            return
        slot = self._slots.pop(video_id, None)
        if slot is None:
            return
        self._engine.close(video_id)
        self._thread.wake()
        for future in slot.chunks.values():
            if not future.done():
                future.set_result(UNKNOWN)
        if slot.task is not None:
            slot.task.cancel()
        self._metrics.inc("diagonal_sessions_total", outcome=outcome)
        self._report_slots()

    async def ready(self) -> bool:
        """Whether chunks come out: one is made for nobody when there was none of late."""
        if self._thread.healthy and not self._thread.proved_within(_PROOF_AGE_S):
            self._thread.ask_exercise()
            late_s = time.monotonic() + self._thread.deadline_s
            while time.monotonic() < late_s and not self._thread.proved_within(_PROOF_AGE_S):
                await asyncio.sleep(_LOOK_EVERY_S)
            return self._thread.healthy and self._thread.proved_within(_PROOF_AGE_S)
        return self._thread.healthy

    def check_health(self) -> None:
        """Called by Serve: a replica whose engine ended, hangs or makes no chunks any more is replaced."""
        if self._thread.lost:
            raise RuntimeError("the engine has ended, hangs, or failed three chunks in a row")

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve, for `serve.policies.routing`."""
        return {"sessions": len(self._slots), "well": self._thread.healthy}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where replicas scale, for `serve.policies.autoscaling`."""
        stats, since = self._engine.stats(), time.monotonic() - _LATELY_S
        return {
            SESSIONS: float(stats.active_sessions),
            SLOTS: float(stats.active_sessions + stats.free_slots),
            BUSY: stats.busy / self._config.serve.budget_share,
            REFUSED: float(sum(at > since for at in self._refused_at)),
        }

    async def shut(self) -> None:
        """End the engine's thread (tests; Serve ends the process)."""
        self._reaper.cancel()
        for video_id in list(self._slots):
            await self.close(video_id, "shutdown")
        self._thread.stop()
        self._encoders.close()
        self._pool.shutdown()
        self._urgent.shutdown()

    def _new_encoder(self, scale: int) -> ChunkEncoder:
        geometry, codec = self._config.geometry, self._settings.codec
        size = (geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps)
        return ChunkEncoder(*size, codec=codec, scale=scale)  # type: ignore[arg-type]

    def _want(self, video_id: str, slot: Slot, chunk: int) -> None:
        """Ask the engine for all chunks up to `chunk` that it was not asked for: it may begin one while it decodes
        the one before."""
        if chunk > slot.wanted:
            slot.wanted = chunk
            if not slot.over:
                with contextlib.suppress(KeyError):  # it failed: that is on its way here
                    self._engine.request(video_id, chunk)
                self._thread.wake()

    def _deliver(self, result: ChunkResult) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._received, result)

    def _received(self, result: ChunkResult) -> None:
        slot = self._slots.get(result.session_id)
        if slot is None:
            return
        slot.made, slot.over = result.chunk, slot.over or result.last or result.error is not None
        slot.chunk(result.chunk)  # from now on there to be waited for
        if result.snapshot is not None:
            slot.snapshots[result.chunk] = result.snapshot
        slot.results.put_nowait(result)

    async def _encode(self, video_id: str, slot: Slot) -> None:
        """Encode one session's chunks in order."""
        over = False
        while not over:
            result = await slot.results.get()
            over = slot.over and slot.results.empty()
            if result.error is not None:
                _LOG.warning("session %s failed in chunk %d", video_id, result.chunk)
                self._fail(slot, result.chunk)
                continue
            started_s = time.monotonic()
            pool = self._pool if result.chunk else self._urgent  # somebody waits for a first one
            try:
                data = await self._loop.run_in_executor(pool, _encode_chunk, slot, result)
            except Exception as error:  # edge: whatever an encoder raises is one session's end, and told at once
                _LOG.error("session %s: chunk %d was not encoded: %s", video_id, result.chunk, type(error).__name__)
                slot.over = True
                return self._fail(slot, result.chunk)
            self._metrics.observe("diagonal_chunk_encode_seconds", time.monotonic() - started_s)
            if slot.trace is not None:
                slot.trace.chunk(result.chunk, len(result.pixels), result.generation_s, started_s)
            self._note_applied(slot, result)
            self._give(slot, result, data)

    def _give(self, slot: Slot, result: ChunkResult, data: bytes) -> None:
        place = (result.first_pixel_frame, result.applied_event_ids, result.last)
        future = slot.chunk(result.chunk)
        if not future.done():
            future.set_result(EncodedChunk(result.chunk, data, len(result.pixels), *place))

    def _fail(self, slot: Slot, chunk: int) -> None:
        failure = Refused("generation_failed", f"generation failed in chunk {chunk}")
        for future in (slot.chunk(chunk), *slot.chunks.values()):
            if not future.done():
                future.set_result(failure)

    def _note_applied(self, slot: Slot, result: ChunkResult) -> None:
        for event_id in result.applied_event_ids:
            received_s = slot.changed_at.pop(event_id, None)
            if received_s is not None:
                self._metrics.observe("diagonal_prompt_update_latency_seconds", time.monotonic() - received_s)

    async def _reap(self) -> None:
        """Free the sessions that no gateway asks for any more."""
        while True:
            await asyncio.sleep(_REAP_EVERY_S)
            now_s = time.monotonic()
            self._note_lateness()
            for video_id in [name for name, slot in self._slots.items() if self._left_behind(slot, now_s)]:
                _LOG.warning("session %s was left behind by its gateway", video_id)
                await self.close(video_id, "abandoned")
            self._report_slots()

    def _note_lateness(self) -> None:
        """Say that steps are late, once for each time that they begin to be."""
        late_s = self._thread.tick()
        if late_s > 0.0:
            self._metrics.inc("diagonal_engine_late_seconds_total", late_s)
            if not self._was_late:
                _LOG.warning("the engine's step is late (over %.1f s): is the machine busy?", self._thread.deadline_s)
        self._was_late = late_s > 0.0

    def _left_behind(self, slot: Slot, now_s: float) -> bool:
        if slot.paused_at is not None:
            return now_s - slot.paused_at > self._config.serve.max_paused_s
        return now_s - slot.asked_at > self._settings.session_idle_timeout_s

    def _report_slots(self) -> None:
        self._metrics.set("diagonal_sessions_free", self._engine.stats().free_slots)
        waiting = sum(slot.wanted > slot.made and not slot.over for slot in self._slots.values())
        self._metrics.set("diagonal_sessions_waiting", waiting)


def _spec(request: OpenSession) -> SessionSpec:
    about = (request.video_id, request.prompt, request.seed, request.frames)
    return SessionSpec(*about, paced=request.paced, record=request.record)


def _encode_chunk(slot: Slot, result: ChunkResult) -> bytes:
    pixels: Pixels = result.pixels.numpy()
    if slot.mark is not None:
        pixels = slot.mark.embed(pixels, result.first_pixel_frame)
    return slot.encoder.encode_chunk(pixels)
