"""A whole service inside the test: real routes, store, drivers and sockets, around an engine of a few lines; and what
tests of it share: clusters of real engines, readers of streams, videos of the store."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import torch
import uvicorn
from ray.exceptions import RayActorError, RayError, RayTaskError

from diagonal.config import Config
from diagonal.engine.engine import CapacityError, Engine, EngineStats, Health
from diagonal.engine.recording import Recording
from diagonal.engine.session import ChunkResult, PromptChange, SessionSpec
from diagonal.engine.snapshot import Snapshot
from diagonal.errors import require
from diagonal.media.encode import ChunkEncoder
from diagonal.mp4 import boxes
from serve.actors import remote_store
from serve.api.realtime import RealtimeLimits
from serve.api.routes import create_app
from serve.gateway.fleet import Fleet
from serve.gateway.gateway import Gateway
from serve.records import LOCAL_CALLER, EncodedChunk, Pacing, Status, VideoRecord
from serve.replica.loading import Loaded
from serve.replica.replica import Replica
from serve.settings import ServeSettings
from serve.store.store import Store
from tests.networks import small_release
from tests.recorded_metrics import RecordedMetrics
from tests.serve.sockets import LOCAL_KEY, give_local_key

Until = Callable[..., Any]
"""The fixture `until`: `until(condition, what)`."""
Keyed = Callable[..., dict[str, str]]
"""The fixture `key`: makes a key, and gives the headers that show it."""
PROMPT, OTHER = "a red circle moves left", "a blue square moves right"


NAMES = ("stable", "next")
CONFIG = Config.from_preset("tiny", ["serve.max_sessions=2", "serve.max_prompt_characters=200", "serve.max_seconds=60"])


@dataclass
class FakeSession:
    spec: SessionSpec
    prompt: str
    wanted: int = -1
    chunk: int = 0
    pending: tuple[PromptChange, ...] = ()
    paused: bool = False
    over: bool = False

    @property
    def asked(self) -> bool:
        return self.chunk <= self.wanted and not self.over


class FakeEngine:
    """The engine's contract without a model: a frame's shade says how many prompt changes came before it.

    `allow` lets that many chunks be made; `fail_at` makes a chunk fail, `break_at` the engine itself.
    """

    def __init__(self) -> None:
        self.config = CONFIG
        self.sessions: dict[str, FakeSession] = {}
        self.made: list[tuple[str, int]] = []
        self.fail_at: int | None = None
        self.break_at: int | None = None
        self._lock, self._budget = threading.Lock(), float("inf")

    def allow(self, chunks: float) -> None:
        """From now on so many chunks are made, and no more."""
        with self._lock:
            self._budget = chunks

    def open(self, spec: SessionSpec) -> None:
        self.check_room(spec)
        with self._lock:
            self.sessions[spec.session_id] = FakeSession(spec, spec.prompt)

    def check_room(self, spec: SessionSpec) -> None:
        require(spec.session_id not in self.sessions, "session_id", spec.session_id, "an id that is not in use")
        if len(self.sessions) >= self.config.serve.max_sessions:
            raise CapacityError(self.config.serve.max_sessions, 2.5)

    def interact(self, session_id: str, change: PromptChange) -> None:
        with self._lock:
            self.sessions[session_id].pending += (change,)

    def request(self, session_id: str, chunk: int | None = None) -> None:
        with self._lock:
            session = self.sessions[session_id]
            session.wanted = max(session.wanted, session.chunk if chunk is None else chunk)

    def pause(self, session_id: str) -> None:
        with self._lock:
            self.sessions[session_id].paused = True

    def resume(self, session_id: str) -> None:
        with self._lock:
            self.sessions[session_id].paused = False

    def restore(self, snapshot: Snapshot, ahead_s: float | None = None) -> None:
        raise NotImplementedError

    def recording(self, session_id: str) -> Recording:
        raise NotImplementedError

    def health(self) -> Health:
        return Health(True, 0)

    def exercise(self) -> bool:
        return True

    def close(self, session_id: str) -> None:
        with self._lock:
            self.sessions.pop(session_id, None)

    def stats(self) -> EngineStats:
        active = len(self.sessions)
        return EngineStats(active, self.config.serve.max_sessions - active, active * 1000, 2000, 0.1)

    def step(self) -> list[ChunkResult]:
        with self._lock:
            asking = [session for session in self.sessions.values() if session.asked and not session.paused]
            if not asking or self._budget <= 0:
                return []
            self._budget -= 1
            session = asking[0]
            return [self._make(session)]

    def _make(self, session: FakeSession) -> ChunkResult:
        geometry, chunk, spec = self.config.geometry, session.chunk, session.spec
        if chunk == self.break_at:
            raise RuntimeError("SECRET_X")
        first = geometry.pixel_start(chunk)
        frames = min(geometry.chunk_pixel_frames(chunk), (spec.pixel_frames or 10**9) - first)
        applied, session.pending = session.pending, ()
        if applied:
            session.prompt = applied[-1].prompt
        session.chunk += 1
        self.made.append((spec.session_id, chunk))
        last = spec.pixel_frames is not None and session.chunk == geometry.chunks_for(spec.pixel_frames)
        error = "SECRET_X" if chunk == self.fail_at else None
        pixels = torch.full((0 if error else frames, 32, 32, 3), shade(session.prompt), dtype=torch.uint8)
        ids, session.over = tuple(change.event_id for change in applied), last or bool(error)
        return ChunkResult(spec.session_id, chunk, pixels, first, 0.01, 4, ids, last or bool(error), error)


async def _dead(*_: Any) -> Any:
    raise RayActorError


def shade(prompt: str) -> int:
    """The grey that the fake engine paints for a prompt."""
    return 40 + 16 * (sum(prompt.encode()) % 12)


class LocalHandle:
    """Stands for a Serve handle: calls the object that `find` gives now for its session, on its own loop."""

    def __init__(self, find: Callable[[str], Any], session_id: str = "") -> None:
        self._find, self._session_id = find, session_id

    def options(self, session_id: str = "", **_: Any) -> LocalHandle:
        return LocalHandle(self._find, session_id)

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            target = self._find(self._session_id)
            if target is None:
                raise RayActorError
            try:
                return await getattr(target, name)(*arguments)
            except RayError:
                raise
            except Exception as error:  # as Ray tells what an actor's method raised
                raise RayTaskError(name, "", error).as_instanceof_cause() from None

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                return asyncio.get_running_loop().create_task(call(*arguments))

        return Method


def with_local_key(app: Any) -> Any:
    """The application, for callers who show the local key unless they show another one."""

    async def keyed(scope: Any, receive: Any, send: Any) -> None:
        headers = scope.get("headers", [])
        if scope["type"] != "lifespan" and not any(name == b"authorization" for name, _ in headers):
            scope["headers"] = [*headers, (b"authorization", LOCAL_KEY["Authorization"].encode())]
        await app(scope, receive, send)

    return keyed


class Service:
    """Store, replica and gateways on one loop in a thread, each gateway behind a real socket.

    With `shows_key` a caller who shows no key counts as one who shows the local key, as the clients do.
    """

    shows_key = True

    def __init__(
        self, settings: ServeSettings, engine: FakeEngine, limits: RealtimeLimits | None = None, **store: float
    ) -> None:
        self.settings, self.engine, self.metrics = settings, engine, RecordedMetrics()
        self._limits = limits
        self.gateways: list[Gateway] = []
        self.urls: list[str] = []
        self._store_options = store
        self._up, self._down = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def start(self) -> None:
        give_local_key(Path(self.settings.data))
        self._thread.start()
        assert self._up.wait(30), "the service did not start"

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._down.set)
        self._thread.join(30)

    def run(self, work: Any) -> Any:
        """Run a coroutine on the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    store: Any  # a `Store`, None while it is away
    replicas: dict[str, Replica]  # by name

    @property
    def replica(self) -> Replica:
        return next(iter(self.replicas.values()))

    def make_replicas(self) -> dict[str, Replica]:
        load = ("fake-tiny", CONFIG, self.engine, False, "", lambda prompt: len(prompt.split()) + 1)
        return {"replica-1": Replica(self.settings, lambda *_: load, self.metrics, "replica-1")}

    def find_replica(self, session_id: str) -> Replica | None:
        """As `serve.policies.routing` does: the one that is named, else the least loaded, another if asked."""
        holder = session_id.rpartition("/")[0]
        ranked = sorted(self.replicas, key=lambda name: (f"!{name}" == holder, len(self.replicas[name]._slots)))
        return self.replicas.get(holder) or next((self.replicas[name] for name in ranked), None)

    def make_fleet(self) -> Fleet:
        return Fleet({self.settings.model: LocalHandle(self.find_replica)})

    async def kill_replica(self, name: str) -> None:
        """A replica's process is gone, with all that it holds."""
        replica = self.replicas.pop(name)
        for method in ("pull", "holds", "interact", "pause", "resume", "close", "open", "restore"):
            setattr(replica, method, _dead)
        for future in [future for slot in replica._slots.values() for future in slot.chunks.values()]:
            if not future.done():
                future.set_exception(RayActorError())
        replica._thread.stop()
        replica._reaper.cancel()
        replica._encoders.close()
        replica._pool.shutdown()

    async def kill_store(self) -> None:
        """The store's process is gone: nobody answers."""
        store, self.store = self.store, None
        assert store is not None
        await store.shut()

    async def restart_store(self) -> None:
        self.store = Store(self.settings, **self._store_options)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.store = Store(self.settings, **self._store_options)
        self.replicas = self.make_replicas()
        servers = [self._server() for _ in range(self.settings.gateways)]
        tasks = [asyncio.create_task(server.serve()) for server in servers]
        while not all(server.started for server in servers):
            await asyncio.sleep(0.01)
        self.urls = [f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}" for server in servers]
        self._up.set()
        await self._down.wait()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)
        for part in (*self.replicas.values(), self.store):
            if part is not None:
                await part.shut()

    def _server(self) -> uvicorn.Server:
        store = remote_store(LocalHandle(lambda _: self.store))
        gateway = Gateway(self.settings, store, self.make_fleet(), self.metrics)
        self.gateways.append(gateway)
        app: Any = create_app(gateway, self.metrics, limits=self._limits)
        if self.settings.auth == "local" and self.shows_key:
            app = with_local_key(app)
        options: dict[str, Any] = {"log_level": "critical", "timeout_graceful_shutdown": 1}
        return uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **options))


class Cluster(Service):
    """Replicas of one small release."""

    def make_replicas(self) -> dict[str, Replica]:
        made: dict[str, Replica] = {}
        for number in range(self.settings.replicas):
            release = small_release()

            def load(*_: Any, release: Any = release) -> Any:
                return release.name, release.config, Engine(release, metrics=self.metrics)

            name = f"replica-{number + 1}"
            made[name] = Replica(self.settings, load, self.metrics, name)
        return made

    def holder(self, video: str) -> str:
        """The name of the replica that the store says holds the session."""
        return str(self.run(self.store.get(video)).replica)

    def kill_holder(self, video: str) -> str:
        name = self.holder(video)
        self.run(self.kill_replica(name))
        return name


class SideBySide(Service):
    """Two releases behind two gateways: `stable` on two replicas, `next` on one. Real engines of small networks."""

    def make_replicas(self) -> dict[str, Replica]:
        return {name: self._make(name) for name in ("stable-1", "stable-2", "next-1")}

    def _make(self, name: str) -> Replica:
        release = replace(small_release(), name=name[:-2])
        engine = Engine(release, metrics=self.metrics)
        loaded = Loaded(release.name, release.config, engine, promoted=release.name == "stable")
        return Replica(self.settings, lambda *_: loaded, self.metrics, name)

    def make_fleet(self) -> Fleet:
        return Fleet({name: LocalHandle(self._finder(name)) for name in NAMES})

    def _finder(self, release: str) -> Callable[[str], Replica | None]:
        def find(session_id: str) -> Replica | None:
            holder = session_id.rpartition("/")[0]
            mine = {name: one for name, one in self.replicas.items() if name.startswith(release)}
            ranked = sorted(mine, key=lambda name: (f"!{name}" == holder, len(mine[name]._slots)))
            return mine.get(holder) or next((mine[name] for name in ranked), None)

        return find

    def share(self, **weights: float) -> None:
        for gateway in self.gateways:
            gateway._fleet.share(weights)

    def holder(self, video: str) -> str:
        return str(self.run(self.store.get(video)).replica)


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[Callable[[], None]]:
    """`with deadline(5, "freed") as tick: while not freed(): tick()`."""
    import time

    end = time.monotonic() + seconds

    def tick() -> None:
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)

    yield tick


def http_client(url: str, headers: dict[str, str] | None = None) -> httpx2.Client:
    """A patient client of a service without TLS: to read the certificates of the world costs more than a request."""
    return httpx2.Client(base_url=url, headers=headers, timeout=60, verify=False)


def start(http: httpx2.Client, frames: int = 81, pacing: str = "none", prompt: str = PROMPT) -> str:
    """The id of a new video."""
    body = {"prompt": prompt, "num_frames": frames, "seed": 3, "extra": {"pacing": pacing}}
    return str(http.post("/v1/videos", json=body).raise_for_status().json()["id"])


def status(http: httpx2.Client, video: str) -> dict[str, Any]:
    return dict(http.get(f"/v1/videos/{video}").json())


def shades(stream: bytes | bytearray) -> list[int]:
    """The grey of each frame."""
    with av.open(io.BytesIO(bytes(stream)), mode="r") as container:
        return [round(float(frame.to_ndarray(format="rgb24").mean())) for frame in container.decode(video=0)]


def fragments(parts: Iterator[bytes], data: bytearray) -> Iterator[str]:
    """Names of the boxes as they come."""
    seen = 0
    for part in parts:
        data += part
        whole = [name for name, _, _ in boxes(bytes(data))]
        yield from whole[seen:]
        seen = len(whole)


def first_s(stream: bytes) -> float:
    """Where the first chunk of a stream stands in its time."""
    at = stream.index(b"tfdt")
    return int.from_bytes(stream[at + 8 : at + 16]) / timescale(stream)


def timescale(stream: bytes) -> int:
    """Ticks a second, of the media header."""
    at = stream.index(b"mdhd")
    return int.from_bytes(stream[at + 16 : at + 20])


def steer(http: httpx2.Client, video: str, **event: Any) -> httpx2.Response:
    return http.post(f"/v1/videos/{video}/interactions", json={"interaction": {"event": event}})


def decoded(stream: bytes | bytearray) -> tuple[Any, list[int]]:
    with av.open(io.BytesIO(bytes(stream)), mode="r") as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [int(frame.pts or 0) for frame in frames]


def assert_same_video(stream: bytes | bytearray, expected: bytes) -> None:
    """Every frame once, at its time; the pictures are those of an undisturbed run but for the encoder's state."""
    (mine, times), (theirs, their_times) = decoded(stream), decoded(expected)
    assert times == their_times
    assert np.abs(mine.astype(int) - theirs.astype(int)).mean() < 4


def finished(http: httpx2.Client, until: Until, **fields: Any) -> dict[str, Any]:
    video = http.post("/v1/videos", json={"prompt": "a red circle", **fields}).raise_for_status().json()
    until(lambda: http.get(f"/v1/videos/{video['id']}").json()["status"] == "completed", "completed")
    return dict(http.get(f"/v1/videos/{video['id']}").json())


VIDEO = VideoRecord(
    id="video_1",
    model="tiny",
    prompt="a red circle",
    seed=7,
    frames=21,
    fps=16,
    scale=1,
    size="32x32",
    pacing=Pacing.NONE,
    created_at=1.0,
    status=Status.QUEUED,
)


def chunks() -> tuple[bytes, list[EncodedChunk]]:
    """An initialisation segment, and a video of two chunks."""
    encoder = ChunkEncoder(32, 32, 16)
    made = []
    for index, (first, frames) in enumerate(((0, 9), (9, 12))):
        data = encoder.encode_chunk(np.zeros((frames, 32, 32, 3), np.uint8))
        made.append(EncodedChunk(index, data, frames, first, (), last=index == 1))
    return encoder.init_segment(), made


async def put_video(store: Store, init: bytes = b"init", video: VideoRecord = VIDEO) -> None:
    assert await store.admit(video, LOCAL_CALLER, None) is None
    assert await store.opened(video.id, "replica-1", "video/mp4", init)
