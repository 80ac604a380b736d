"""Fault S11: far, narrow and unsteady networks. Credits bound the lead, stalls are counted, nothing is lost."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from serve.replica import replica
from tests.serve.conftest import engine, make_service, settings  # noqa: F401
from tests.serve.harness import FakeEngine, Service
from tests.serve.sockets import Viewer, viewer
from tests.serve.wire import wire

CHUNK_S, CHUNK_BYTES = 0.75, 94_000  # 1 Mb/s, as a large picture takes
WINDOW_S = 1.5


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a megabit a second of media: what MP4 calls free space is added to each."""
    encode, space = replica._encode_chunk, struct.pack(">I4s", CHUNK_BYTES, b"free") + os.urandom(CHUNK_BYTES - 8)
    monkeypatch.setattr(replica, "_encode_chunk", lambda *arguments: encode(*arguments) + space)


class Player:
    """Plays what came, tells its position five times a second, and waits when there is nothing left to play."""

    def __init__(self, one: Viewer, made_by: FakeEngine) -> None:
        self._one, self._engine = one, made_by
        self._over = threading.Event()
        self.leads: list[float] = []
        self.stalled_s = 0.0

    def play(self, chunks: int) -> None:
        """So many chunks; the lead that the engine had over playback is noted at each look."""
        ticking = threading.Thread(target=self._tick, daemon=True)
        ticking.start()
        self._one.read(chunks)
        self._over.set()
        ticking.join(10)

    def _tick(self) -> None:
        played_s, at_s = 0.0, time.monotonic()
        while not self._over.wait(0.2):
            now_s = time.monotonic()
            media_s = sum(chunk["num_frames"] for chunk in list(self._one.chunks)) / 16
            step_s = min(now_s - at_s, media_s - played_s)
            self.stalled_s += (now_s - at_s - step_s) if media_s else 0.0
            played_s, at_s = played_s + step_s, now_s
            made = sum(video == self._one.request_id for video, _ in list(self._engine.made))
            self.leads.append((12 * made - 3) / 16 - played_s)
            self._one.say("session.playback", position_seconds=played_s)


@pytest.mark.parametrize(
    ("delay_s", "jitter_s", "bytes_per_s"), [(0.2, 0.1, 0.0), (0.2, 0.0, 125_000.0 * 1.4)], ids=["far", "narrow"]
)
def test_s11_over_a_network_that_is_just_good_enough_nothing_stalls_for_long(
    make_service: Callable[..., Service],
    engine: FakeEngine,
    heavy: None,  # noqa: F811
    delay_s: float,
    jitter_s: float,
    bytes_per_s: float,
) -> None:
    service = make_service()
    with wire(service.urls[0], delay_s=delay_s, jitter_s=jitter_s, bytes_per_s=bytes_per_s) as far:
        with viewer(far.url) as one:
            one.start(num_frames=105, streaming_buffer_seconds=WINDOW_S)
            player = Player(one, engine)
            player.play(9)
            one.until("session.done")
    assert one.indices == list(range(9))
    assert max(player.leads) <= WINDOW_S + CHUNK_S + 0.05, "made ahead of what was played"
    assert player.stalled_s < 10, "the start, and what a busy machine adds"


def test_s11_over_a_network_that_is_too_narrow_playback_stalls_and_that_is_counted(
    make_service: Callable[..., Service],
    engine: FakeEngine,
    heavy: None,  # noqa: F811
) -> None:
    """Half of what the stream needs: generation follows the viewer, and runs no further ahead than he asked for."""
    service = make_service()
    with wire(service.urls[0], delay_s=0.05, bytes_per_s=62_500.0) as narrow, viewer(narrow.url) as one:
        one.start(num_frames=69, streaming_buffer_seconds=WINDOW_S)
        player = Player(one, engine)
        player.play(6)
        one.until("session.done")
    assert one.indices == list(range(6)) and player.stalled_s > 2.0
    assert max(player.leads) <= WINDOW_S + CHUNK_S + 0.05
    counted: list[Any] = service.metrics.values("diagonal_stream_stalls_total")
    assert len(counted) >= 2 and sum(service.metrics.values("diagonal_stream_stall_seconds_total")) > 0.5


def test_s11_and_s3_a_connection_that_comes_back_after_an_outage_goes_on(
    make_service: Callable[..., Service],
    engine: FakeEngine,  # noqa: F811
) -> None:
    """The cable is in again before anybody gave up: the same socket goes on, with no chunk twice and none missing."""
    service = make_service()
    with wire(service.urls[0], delay_s=0.02) as cable, viewer(cable.url) as one:
        one.start(num_frames=81, streaming_buffer_seconds=WINDOW_S)
        one.read(2)
        cable.dead = True
        one.say("session.playback", position_seconds=100.0)
        time.sleep(1.5)
        assert len(engine.made) <= 3
        cable.dead = False
        one.until("session.done")
    assert one.indices == list(range(7)) and [chunk for _, chunk in engine.made] == list(range(7))
