"""Ready means that chunks come out: not while replicas load, not while the engine hangs or only fails."""

from __future__ import annotations

import threading
from typing import Any

import httpx2
import pytest

from tests.serve.harness import FakeEngine, Service, Until


def status(http: httpx2.Client) -> int:
    return http.get("/health/ready").status_code


def test_a_service_without_a_loaded_replica_is_live_and_not_ready(service: Service, http: httpx2.Client) -> None:
    loaded = service.replicas.copy()
    service.replicas.clear()  # Serve gives a call to no replica whose constructor has not ended
    assert status(http) == 503 and http.get("/health/live").status_code == 200
    answer = http.get("/health/ready")
    assert answer.json()["error"]["code"] == "not_ready" and answer.headers["retry-after"]
    service.replicas.update(loaded)
    assert status(http) == 200


@pytest.mark.slow
def test_a_service_is_not_ready_while_its_engine_hangs(engine: FakeEngine, http: httpx2.Client, until: Until) -> None:
    goes_on, step = threading.Event(), engine.step

    def hang() -> list[Any]:
        goes_on.wait(60)
        return step()

    assert status(http) == 200
    engine.step = hang  # type: ignore[method-assign]
    try:
        http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 9}).raise_for_status()
        until(lambda: status(http) == 503, "not ready", 20)
        assert http.get("/health/live").status_code == 200, "it hangs, and is not to be restarted for that"
    finally:
        goes_on.set()
    until(lambda: status(http) == 200, "ready again", 20)


@pytest.mark.slow
def test_a_service_whose_engine_can_make_no_chunk_is_not_ready(
    engine: FakeEngine, http: httpx2.Client, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.replica.replica._PROOF_AGE_S", 0.05)
    assert status(http) == 200
    engine.exercise = lambda: False  # type: ignore[method-assign]
    until(lambda: status(http) == 503, "an idle engine is asked to make a chunk, and makes none", 20)
    assert http.get("/health/ready").json()["error"]["code"] == "not_ready"
    engine.exercise = lambda: True  # type: ignore[method-assign]
    until(lambda: status(http) == 200, "ready again", 20)
