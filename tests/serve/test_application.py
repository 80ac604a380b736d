"""The application on a real Ray cluster, with the embedded release: the journey of a video, and what Ray sees of it."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import yaml

from diagonal.client.cli import main
from diagonal.metrics import BY_NAME
from serve.settings import ServeSettings

Until = Callable[..., Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two gateways in front of two replicas of the embedded release."""
    from ray import serve

    from serve.app import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"data": str(tmp_path_factory.mktemp("serve")), "gateways": "2", "replicas": "2", "replica_cpus": "0.5"}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(arguments), name="diagonal", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def start(http: httpx.Client, **fields: Any) -> str:
    body = {"prompt": "a red circle moving right slowly", "seed": 1} | fields
    return str(http.post("/v1/videos", json=body).raise_for_status().json()["id"])


def count_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_streamed_while_it_is_made_and_is_there_afterwards(http: httpx.Client, until: Until) -> None:
    video = start(http)
    stream = http.get(f"/v1/videos/{video}/stream")
    assert stream.headers["content-type"] == "video/mp4" and count_frames(stream.content) == 81
    until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", "completed")
    assert count_frames(http.get(f"/v1/videos/{video}/content").content) == 81


def test_the_command_line_saves_a_video(url: str, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    common = ["a red circle moving right slowly", "--out", str(out), "--url", url]
    assert main(["generate", *common, "--frames", "30"]) == 0
    assert count_frames(out.read_bytes()) == 30
    assert main(["stream", *common, "--seconds", "1"]) == 0
    assert count_frames(out.read_bytes()) == 16


def test_a_seed_gives_the_same_video_whichever_replica_makes_it(http: httpx.Client) -> None:
    streams = {http.get(f"/v1/videos/{start(http, num_frames=21)}/stream").content for _ in range(4)}
    assert len(streams) == 1


def test_sessions_spread_over_the_replicas_and_stay_there(http: httpx.Client) -> None:
    from ray import serve

    videos = [start(http, seed=number) for number in range(4)]
    with ThreadPoolExecutor(4) as readers:
        streams = readers.map(lambda video: http.get(f"/v1/videos/{video}/stream").content, videos)
        assert [count_frames(stream) for stream in streams] == [81] * 4
    store = serve.get_deployment_handle("Store", "diagonal")
    records = [store.get.remote(video).result(timeout_s=30) for video in videos]
    assert len({record.replica for record in records}) == 2


def test_a_prompt_change_reaches_the_video(http: httpx.Client) -> None:
    video = start(http, seconds=8, extra={"pacing": "realtime"})
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        parts = answer.iter_raw()
        next(parts)
        body = {"interaction": {"event_id": "e1", "event": {"prompt": "a blue square moving left fast"}}}
        assert http.post(f"/v1/videos/{video}/interactions", json=body).status_code == 202
        for _ in parts:
            (change,) = http.get(f"/v1/videos/{video}").json()["interactions"]
            if change["status"] == "applied":
                break
    assert 1 <= change["chunk"] <= 5


def test_who_leaves_a_realtime_video_frees_its_place(http: httpx.Client, until: Until) -> None:
    video = start(http, seconds=60, extra={"pacing": "realtime"})
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        next(answer.iter_raw())
    told = until(lambda: (v := http.get(f"/v1/videos/{video}").json())["status"] == "cancelled" and v, "cancelled")
    assert told["chunks_done"] <= 5


def test_every_answer_carries_one_request_id(http: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/nothing"):
        assert len(http.get(path).headers.get_list("x-request-id")) == 1


def test_the_service_says_that_it_is_ready(http: httpx.Client) -> None:
    assert http.get("/health/ready").json() == {"status": "ready"}


def test_the_metrics_are_on_rays_own_endpoint(http: httpx.Client, until: Until) -> None:
    import ray

    http.get(f"/v1/videos/{start(http, num_frames=21)}/stream")
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = [
        "diagonal_time_to_first_frame_seconds",
        "diagonal_chunk_generation_seconds",
        "diagonal_chunk_encode_seconds",
        "diagonal_generation_frames_per_second",
        "diagonal_frames_generated_total",
        "diagonal_frames_sent_total",
        "diagonal_sessions_active",
        "diagonal_kv_cache_bytes",
        "diagonal_model_forward_calls_total",
    ]
    assert set(wanted) <= set(BY_NAME)

    def all_there() -> bool:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        return all(f"ray_{name}" in text for name in wanted)

    until(all_there, "all metrics are exported", seconds=40)


def test_the_shipped_configuration_is_one_that_serve_and_the_application_accept(repository: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load((repository / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(data)
    assert set(data) <= set(ServeDeploySchema.model_fields) and schema.http_options.host == "127.0.0.1"
    (application,) = data["applications"]
    assert application["import_path"] == "serve.app:build"
    assert ServeSettings.from_arguments(application["args"]) == ServeSettings()


def test_gateway_and_store_load_no_torch() -> None:
    code = "import sys, serve.ingress, serve.store; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
