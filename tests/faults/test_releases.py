"""Releases side by side on a real Ray Serve: weights change while sessions run, and an unjudged release is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest

from tests.faults.releases import ConfiguredService, variant
from tests.faults.watchers import OverHttp
from tests.serve.sockets import LOCAL_KEY

BODY = {"prompt": "a red circle moving right slowly", "num_frames": 9}


@pytest.fixture
def live(ray_cluster: str, tmp_path: Path) -> Iterator[ConfiguredService]:
    service = ConfiguredService(str(tmp_path / "data"))
    service.open()
    yield service
    service.close()


def model_of_next_video(live: ConfiguredService) -> str:
    """It is seen to its end, so that the next one finds a free slot."""
    video = httpx2.post(f"{live.url}/v1/videos", headers=LOCAL_KEY, json=BODY, timeout=60).raise_for_status().json()
    httpx2.get(f"{live.url}/v1/videos/{video['id']}/stream", headers=LOCAL_KEY, timeout=60).raise_for_status()
    return str(video["model"])


def offered(live: ConfiguredService) -> list[str]:
    models = httpx2.get(f"{live.url}/v1/models", headers=LOCAL_KEY, timeout=30).raise_for_status().json()["data"]
    return [str(model["id"]) for model in models]


def makes(live: ConfiguredService, wanted: str) -> bool:
    return model_of_next_video(live) == wanted


def test_a_canary_and_its_rollback_replace_no_replica_and_disturb_no_stream(
    live: ConfiguredService, tmp_path: Path
) -> None:
    live.configure(releases=f"stable=,next={variant(tmp_path / 'r2')}", gateways=2, replica_cpus=0.5)
    while not live.ready():
        assert not live.failure(), live.failure()
        time.sleep(0.5)
    live.settle()
    parts = live.all_parts()
    assert len(parts) == 5 and model_of_next_video(live) == "stable"
    watcher = OverHttp(live.url, seconds=20, seed=1).start()
    watcher.reached(3)
    holder = live.holder(watcher.id)
    for weights, wanted in (({"next": 1.0}, "next"), ({"stable": 1.0, "next": 0.0}, "stable")):
        live.configure(weights)
        follows = partial(makes, live, wanted)
        live.until("new videos follow the weights", follows)
        live.settle()
        assert {model_of_next_video(live) for _ in range(4)} == {wanted}, "of both gateways"
        assert live.all_parts() == parts
    live.configure({"other": 1.0})  # a slip: running gateways keep the weights that they have
    time.sleep(3)
    live.settle()
    assert model_of_next_video(live) == "stable" and live.all_parts() == parts
    assert live.holder(watcher.id) == holder
    watcher.finish()
    assert live.record(watcher.id).frames_done == 320 and watcher.longest_gap_s() < 5.0


def test_a_canary_in_an_application_of_its_own_comes_and_goes_beside_the_others(
    live: ConfiguredService, tmp_path: Path
) -> None:
    live.configure(model="stable", replica_cpus=0.5)
    live.until("the service is ready", live.ready)
    live.settle()
    parts = live.all_parts()
    canary = variant(tmp_path / "r2")
    live.configure({"stable": 1.0, "next": 1e6}, canary=canary)
    # While it loads, the other one makes them.
    live.until("the canary makes videos", partial(makes, live, "next"))
    assert offered(live) == ["stable", "next"] and live.all_parts() == parts
    # As the runbook has it: what is being made on the canary ends there before it goes.
    live.configure({"stable": 1.0, "next": 0.0}, canary=canary)
    live.until("the canary makes no videos", partial(makes, live, "stable"))
    live.configure({"stable": 1.0})
    live.until("the canary is gone", lambda: offered(live) == ["stable"])
    refused = httpx2.post(f"{live.url}/v1/videos", headers=LOCAL_KEY, json=BODY | {"model": "next"}, timeout=60)
    assert refused.status_code == 404 and live.all_parts() == parts


def test_a_release_that_nobody_promoted_is_not_served_unless_asked(live: ConfiguredService, tmp_path: Path) -> None:
    release = variant(tmp_path / "r3", promoted=False)
    live.configure(release=release)
    why = live.until("Serve gives up", live.failure)
    assert "release r3" in why and "not promoted" in why and "allow_unpromoted: true" in why
    live.configure(release=release, allow_unpromoted=True)
    live.until("it is served", live.ready)
    (model,) = httpx2.get(f"{live.url}/v1/models", headers=LOCAL_KEY, timeout=30).json()["data"]
    assert (model["id"], model["promoted"]) == ("r3", False)
