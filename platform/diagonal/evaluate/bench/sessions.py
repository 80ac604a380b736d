"""How many sessions one device plays in real time without a stall, and what sharing forwards gains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from diagonal.engine.engine import Engine
from diagonal.engine.session import ChunkResult, SessionSpec
from diagonal.evaluate.bench.rates import PROMPT, Clock
from diagonal.media.encode import ChunkEncoder

Row = dict[str, Any]
_NAP_S = 0.002
_DEADLINE_S = 120.0


@dataclass
class Viewer:
    """One player: it starts with its first chunk, plays in real time, and stalls when the next one comes too late."""

    session_id: str
    encoder: ChunkEncoder | None
    fps: int
    started_s: float | None = None
    frames: int = 0
    stalls: int = 0
    asked: bool = False
    least_slack_s: float = float("inf")
    sending: list[Future[None]] = field(default_factory=list)

    def ahead_s(self, now_s: float) -> float:
        """Media that is there and not yet played."""
        return 0.0 if self.started_s is None else self.frames / self.fps - (now_s - self.started_s)

    def receive(self, result: ChunkResult) -> None:
        """Encode a chunk and take it in; on the encoder's thread."""
        if self.encoder is not None:
            self.encoder.encode_chunk(result.pixels.numpy())
        now_s = time.monotonic()
        if self.started_s is None:
            self.started_s = now_s
        else:
            slack_s = self.ahead_s(now_s)
            self.least_slack_s = min(self.least_slack_s, slack_s)
            if slack_s < 0:
                self.stalls += 1
                self.started_s -= slack_s  # it waited so long
        self.frames += len(result.pixels)
        self.asked = False


def play(engine: Engine, sessions: int, media_s: float, scale: int, threads: int = 2, encode: bool = True) -> Row:
    """So many viewers of `media_s` seconds each, begun together; a stall is a chunk that came after its time."""
    geometry, lead_s = engine.geometry, engine.config.serve.playout_lead_s
    size = geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps
    viewers = [
        Viewer(f"viewer-{n}", ChunkEncoder(*size, scale=scale) if encode else None, geometry.pixel_fps)
        for n in range(sessions)
    ]
    for number, viewer in enumerate(viewers):
        engine.open(SessionSpec(viewer.session_id, PROMPT, number, None, paced=False))
    by_id, wanted = {viewer.session_id: viewer for viewer in viewers}, round(media_s * geometry.pixel_fps)
    late_s = time.monotonic() + media_s + _DEADLINE_S
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as beside:
            while any(viewer.frames < wanted for viewer in viewers) and time.monotonic() < late_s:
                now_s = time.monotonic()
                for viewer in viewers:
                    if not viewer.asked and viewer.frames < wanted and viewer.ahead_s(now_s) < lead_s:
                        viewer.asked = True
                        engine.request(viewer.session_id)
                made = engine.step()
                for result in made:
                    _deliver(by_id[result.session_id], result, beside)
                if not made:
                    time.sleep(_NAP_S)
            for viewer in viewers:
                for sent in viewer.sending:
                    sent.result(_DEADLINE_S)
    finally:
        close_all(engine, list(by_id))
    return {
        "sessions": sessions,
        "media_s": media_s,
        "stalls": sum(viewer.stalls for viewer in viewers),
        "least_slack_s": min(viewer.least_slack_s for viewer in viewers),
        "finished": all(viewer.frames >= wanted for viewer in viewers),
    }


def _deliver(viewer: Viewer, result: ChunkResult, beside: ThreadPoolExecutor) -> None:
    if result.error is not None:
        raise RuntimeError(result.error)
    viewer.sending.append(beside.submit(viewer.receive, result))


def most_sessions(engine: Engine, limit: int, media_s: float, scale: int, ends_s: float, encode: bool = True) -> Row:
    """The most viewers, up to `limit`, of whom nobody stalls: found from above, halving what is left to try."""
    tried: list[Row] = []
    low, high = 0, limit
    while low < high and time.monotonic() < ends_s:
        sessions = (low + high + 1) // 2
        tried.append(play(engine, sessions, media_s, scale, encode=encode))
        if tried[-1]["stalls"] == 0 and tried[-1]["finished"]:
            low = sessions
        else:
            high = sessions - 1
    return {
        "sessions": low,
        "limit": limit,
        "media_s": media_s,
        "decided": low >= high,
        "tried": tried,
        "encoded": encode,
    }


def throughput(engine: Engine, sessions: int, chunks: int, clock: Clock = time.perf_counter) -> float:
    """Pixel frames a second that so many sessions get together, unpaced, after their windows are full."""
    geometry = engine.geometry
    names = [f"busy-{number}" for number in range(sessions)]
    for number, name in enumerate(names):
        engine.open(SessionSpec(name, PROMPT, number, None, paced=False))
    window = engine.config.cache.window_frames // geometry.chunk_frames
    try:
        _rounds(engine, names, window)
        started_s = clock()
        frames = _rounds(engine, names, chunks)
        return frames / (clock() - started_s)
    finally:
        close_all(engine, names)


def _rounds(engine: Engine, names: Sequence[str], chunks: int) -> int:
    """A chunk of each, so many times; the frames of all."""
    frames = 0
    for _ in range(chunks):
        for name in names:
            engine.request(name)
        left = len(names)
        while left:
            made = engine.step()
            left -= len(made)
            frames += sum(len(result.pixels) for result in made)
    return frames


def close_all(engine: Engine, names: Sequence[str]) -> None:
    for name in names:
        engine.close(name)
    engine.step()
