"""Fault S15: streams come, stay and go for long, and nothing grows: memory, files, sessions; and no time is wrong.

DIAGONAL_SOAK_S=86400 makes a day of it. Chunks are made as fast as they are taken, so a minute here is many of a
viewer's.
"""

from __future__ import annotations

import ctypes
import gc
import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from serve.settings import ServeSettings
from tests.serve.harness import FakeEngine, Service, http_client
from tests.serve.hostile import memory_bytes, open_files, start
from tests.serve.sockets import cut, viewer

SOAK_S = float(os.environ.get("DIAGONAL_SOAK_S", "90"))
SAMPLES = 30
VIEWERS = 3


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Finished videos are removed after two seconds, so that the disk does not fill, either."""
    engine = FakeEngine()
    engine.config = replace(engine.config, serve=replace(engine.config.serve, max_sessions=VIEWERS + 2))
    made = Service(ServeSettings(data=str(tmp_path), gateways=2, retention_s=2.0), engine, None, sweep_s=0.5)
    made.metrics = Forgetful()  # type: ignore[assignment]
    made.start()
    yield made
    made.stop()


class Forgetful:
    """A backend that keeps nothing, as one that is scraped."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        pass

    set = observe = inc


class Checked:
    """What was received: chunks in all, and whatever was wrong with one."""

    def __init__(self) -> None:
        self.chunks, self.streams = 0, 0
        self.wrong: list[str] = []

    def note(self, stream: bytes, frames: int) -> None:
        """Every frame at its time, to the tick."""
        with av.open(io.BytesIO(stream), mode="r") as container:
            track = container.streams.video[0]
            assert track.time_base is not None
            tick = int(1 / (16 * track.time_base))
            times = [packet.pts for packet in container.demux(track) if packet.pts is not None]
        if times != [tick * number for number in range(frames)]:
            self.wrong.append(f"{len(times)} of {frames} frames")
        self.chunks, self.streams = self.chunks + 1 + -(-(frames - 9) // 12), self.streams + 1


def watch(service: Service, seen: Checked, until_s: float, number: int) -> None:
    """One viewer after another: over a socket, over a socket that breaks in the middle, by a plain request."""
    turn = number
    with http_client(service.urls[number % 2]) as http:
        while time.monotonic() < until_s and not seen.wrong:
            turn += 1
            if turn % 3 == 0:
                video = start(http, num_frames=861)
                seen.note(http.get(f"/v1/videos/{video}/stream").content, 861)
                http.delete(f"/v1/videos/{video}")
                continue
            with viewer(service.urls[turn % 2]) as one:
                one.start(num_frames=861, extra_params={"pacing": "none"})
                if turn % 3 == 1:
                    one.read(10)
                    cut(one)
                else:
                    one.until("session.done")
            if turn % 3 == 1:
                with viewer(service.urls[(turn + 1) % 2]) as two:
                    two.start(resume_token=one.resume_token)
                    two.until("session.done")
                    one.video += two.video
            seen.note(bytes(one.video), 861)


def give_back_freed() -> None:
    """Have the C library return what is freed: its pools fill for minutes and look as if something grew."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def test_s15_nothing_grows_and_every_frame_is_at_its_time(service: Service) -> None:
    began_s, seen = time.monotonic(), Checked()
    until_s = began_s + SOAK_S
    viewers = [(service, seen, until_s, number) for number in range(VIEWERS)]
    threads = [threading.Thread(target=watch, args=one, daemon=True) for one in viewers]
    for thread in threads:
        thread.start()
    points: list[tuple[float, int, int]] = []
    while time.monotonic() < until_s and not seen.wrong:
        time.sleep(SOAK_S / SAMPLES)
        gc.collect()
        service.engine.made.clear()
        give_back_freed()
        points.append((time.monotonic() - began_s, memory_bytes(), open_files()))
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not seen.wrong and seen.streams >= 6, (seen.wrong, seen.streams)
    later = np.array(points[len(points) // 3 :], dtype=float)  # after the first third all is warm
    growth = float(np.polyfit(later[:, 0], later[:, 1], 1)[0]) * (later[-1, 0] - later[0, 0])
    print(f"{seen.streams} streams, {seen.chunks} chunks; memory {growth / 1e6:+.1f} MB over the last two thirds")
    assert growth < 15e6, f"memory grew by {growth / 1e6:.1f} MB over {seen.chunks} chunks"
    assert np.median(later[-5:, 2]) <= np.median(later[:5, 2]) + 4, "files and sockets"
    assert not service.engine.sessions and not service.replica._slots
    for gateway in service.gateways:
        assert not gateway._drivers._tasks
    assert len(service.store._presences) <= VIEWERS
