"""Replicas come with load and go with it, on a real Ray Serve, and no stream is cut when they go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.faults.releases import ConfiguredService, variant
from tests.faults.watchers import PROMPT, Watcher
from tests.serve.harness import http_client
from tests.serve.sockets import LOCAL_KEY

SECONDS = 240.0  # more than a busy machine needs to start a second replica; nobody waits for it to end
LAST_S = 30.0  # until one of them is gone again


@pytest.fixture
def live(ray_cluster: str, tmp_path: Path) -> Iterator[ConfiguredService]:
    """One replica with two slots, at most two of them."""
    service = ConfiguredService(str(tmp_path / "data"))
    service.open()
    release = variant(tmp_path / "r1", "serve.max_sessions=2", "serve.budget_share=1.0")
    service.configure(
        release=release, replicas=1, max_replicas=2, scale_up_delay_s=1.0, scale_down_delay_s=4.0, headroom=0.0
    )
    yield service
    service.close()


def replicas(live: ConfiguredService) -> int:
    return len(live.parts("Replica"))


class Patient(Watcher):
    """Watches one video over HTTP; asks for it again while there is no room."""

    def _watch(self) -> None:
        body = {"prompt": PROMPT, "num_frames": self.frames, "seed": self.seed, "extra": {"pacing": "realtime"}}
        with http_client(self.url, LOCAL_KEY) as http:
            while (asked := http.post("/v1/videos", json=body)).status_code == 429:
                time.sleep(0.5)
            self.id = asked.raise_for_status().json()["id"]
            with http.stream("GET", f"/v1/videos/{self.id}/stream") as answer:
                for part in answer.iter_raw():
                    self.video += part
                    self.came_s.append(time.monotonic())


def test_replicas_follow_the_load_and_no_stream_is_cut(live: ConfiguredService) -> None:
    live.until("the service is ready", lambda: live.ready() and replicas(live) >= 1)
    assert replicas(live) == 1, "ready means that a replica runs, and one is enough for nobody"
    two = [Patient(live.url, SECONDS, seed).start() for seed in (1, 2)]
    for watcher in two:
        watcher.reached(2)
    third = Patient(live.url, LAST_S, 3).start()
    live.until("a second replica runs", lambda: replicas(live) == 2)
    third.reached(2)
    records = [live.record(watcher.id) for watcher in (*two, third)]
    assert not [one.error_code for one in records if one.error_code], records
    assert records[2].replica not in {one.replica for one in records[:2]}, records
    for watcher in two:
        httpx2.delete(f"{live.url}/v1/videos/{watcher.id}", timeout=60).raise_for_status()
    live.until("one replica is left", lambda: replicas(live) == 1)
    third.finish()
    assert live.record(third.id).frames_done == LAST_S * 16
    live.settle()
