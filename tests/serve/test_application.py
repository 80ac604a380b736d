"""The application on a real Ray cluster, with the embedded release: the journey of a video, and what Ray sees of it."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx2
import psutil
import pytest
import yaml
from websockets.exceptions import InvalidStatus

from diagonal.cli import main
from diagonal.client.client import API_KEY_VARIABLE
from diagonal.metrics import BY_NAME
from serve.settings import ServeSettings
from tests.serve.harness import Until, http_client
from tests.serve.sockets import LOCAL_KEY, LOCAL_TOKEN, cut, give_local_key, viewer

pytestmark = pytest.mark.slow
PROBE = {"DIAGONAL_TEST_PROBE": "of the application"}


@pytest.fixture(scope="module")
def url(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two gateways in front of two replicas of the embedded release, built as Serve builds a configuration file."""
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = tmp_path_factory.mktemp("serve")
    give_local_key(data)
    arguments = {"data": str(data), "gateways": "2", "replicas": "2", "replica_cpus": "0.5"}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.get(ray.remote(runtime_env={"env_vars": PROBE})(deploy).remote(arguments))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(arguments: dict[str, str]) -> None:
    """Runs in a worker whose `runtime_env` is the application's."""
    from ray import serve

    from serve.app import build

    serve.run(build(arguments), name="diagonal", route_prefix="/")


@pytest.fixture
def http(url: str) -> Iterator[httpx2.Client]:
    with http_client(url, LOCAL_KEY) as client:
        yield client


def start(http: httpx2.Client, **fields: Any) -> str:
    body = {"prompt": "a red circle moving right slowly", "seed": 1} | fields
    return str(http.post("/v1/videos", json=body).raise_for_status().json()["id"])


def count_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_streamed_while_it_is_made_and_is_there_afterwards(http: httpx2.Client, until: Until) -> None:
    video = start(http)
    stream = http.get(f"/v1/videos/{video}/stream")
    assert stream.headers["content-type"] == "video/mp4" and count_frames(stream.content) == 81
    until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", "completed")
    assert count_frames(http.get(f"/v1/videos/{video}/content").content) == 81


def test_the_command_line_saves_a_video(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, LOCAL_TOKEN)
    out = tmp_path / "x.mp4"
    common = ["a red circle moving right slowly", "--out", str(out), "--url", url]
    assert main(["generate", *common, "--frames", "30"]) == 0
    assert count_frames(out.read_bytes()) == 30
    assert main(["stream", *common, "--seconds", "1"]) == 0
    assert count_frames(out.read_bytes()) == 16


def test_a_seed_gives_the_same_video_whichever_replica_makes_it(http: httpx2.Client) -> None:
    streams = {http.get(f"/v1/videos/{start(http, num_frames=21)}/stream").content for _ in range(4)}
    assert len(streams) == 1


def test_sessions_spread_over_the_replicas_and_stay_there(http: httpx2.Client) -> None:
    from ray import serve

    # At the speed of playback, so that the first is still there when the last one comes.
    videos = [start(http, seed=number, extra={"pacing": "realtime"}) for number in range(4)]
    with ThreadPoolExecutor(4) as readers:
        streams = readers.map(lambda video: http.get(f"/v1/videos/{video}/stream").content, videos)
        assert [count_frames(stream) for stream in streams] == [81] * 4
    store = serve.get_deployment_handle("Store", "diagonal")
    records = [store.get.remote(video).result(timeout_s=30) for video in videos]
    assert len({record.replica for record in records}) == 2


def test_a_prompt_change_reaches_the_video(http: httpx2.Client) -> None:
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


def test_who_leaves_a_realtime_video_frees_its_place(http: httpx2.Client, until: Until) -> None:
    video = start(http, seconds=60, extra={"pacing": "realtime"})
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        next(answer.iter_raw())
    told = until(lambda: (v := http.get(f"/v1/videos/{video}").json())["status"] == "cancelled" and v, "cancelled")
    assert told["chunks_done"] <= 5


def test_every_answer_carries_one_request_id(http: httpx2.Client) -> None:
    for path in ("/v1/models", "/v1/nothing"):
        answer = http.get(path, headers={"X-Request-Id": "mine-1"})
        assert answer.headers.get_list("x-request-id") == ["mine-1"]


def test_behind_serves_proxy_the_local_key_opens_and_no_address_does(url: str) -> None:
    wrong = {"Authorization": "Bearer dk_0_x"}
    for headers, status in ((LOCAL_KEY, 200), ({}, 401), (wrong, 401), (LOCAL_KEY | {"Host": "videos.example"}, 403)):
        assert httpx2.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == status


def test_a_session_over_a_socket_is_steered_and_goes_on_after_a_break(url: str) -> None:
    with viewer(url) as one:
        one.start(prompt="a red circle moving right slowly", seconds=6, seed=1)
        one.read(2)
        interaction = {"event_id": "e1", "event": {"prompt": "a blue square moving left quickly"}}
        one.say("session.interaction", interaction=interaction)
        one.until("session.interaction.queued")
        cut(one)
    with viewer(url) as two:
        two.start(resume_token=one.resume_token)
        assert two.until("session.done")["stopped"] is False
    chunks = one.chunks + two.chunks
    assert [chunk["generation_chunk_index"] for chunk in chunks] == list(range(len(chunks)))
    assert ["e1"] in [chunk["started_event_ids"] for chunk in chunks]
    assert count_frames(bytes(one.video + two.video)) == 96


def test_an_upgrade_is_refused_through_the_proxy_with_its_status(url: str) -> None:
    for headers, status in (({"Origin": "http://evil.example"}, 403), ({"Authorization": "Bearer dk_0_x"}, 401)):
        with pytest.raises(InvalidStatus) as caught, viewer(url, headers):
            pass
        assert caught.value.response.status_code == status


def test_a_replica_that_is_killed_does_not_end_the_stream(http: httpx2.Client, until: Until) -> None:
    import ray
    from ray import serve
    from ray.util import list_named_actors

    video = start(http, seconds=10, extra={"pacing": "realtime"})
    store = serve.get_deployment_handle("Store", "diagonal")
    data, came, killed = bytearray(), [time.monotonic()], ""
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        for part in answer.iter_raw():
            data += part
            came.append(time.monotonic())
            if not killed and http.get(f"/v1/videos/{video}").json()["chunks_done"] >= 4:
                killed = store.get.remote(video).result(timeout_s=30).replica
                (actor,) = [one for one in list_named_actors(all_namespaces=True) if one["name"].endswith(killed)]
                ray.kill(ray.get_actor(**actor))
    assert killed and count_frames(bytes(data)) == 160
    assert store.get.remote(video).result(timeout_s=30).replica != killed
    longest_s = max(later - before for before, later in zip(came, came[1:], strict=False))
    assert longest_s < 20, "about two seconds on a calm machine"
    until(lambda: http.get("/health/ready").status_code == 200, "ready again")


@pytest.mark.parametrize("part", ["Store", "Gateway", "Replica"])
def test_the_applications_runtime_env_reaches_every_part(url: str, part: str) -> None:
    title = f"ray::ServeReplica:diagonal:{part}"
    parts = [one for one in psutil.process_iter() if " ".join(one.cmdline()).startswith(title)]
    assert parts
    for one in parts:
        environment = one.environ()
        assert PROBE.items() <= environment.items() and environment["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] == "0"


def test_the_service_says_that_it_is_ready(http: httpx2.Client) -> None:
    assert http.get("/health/ready").json() == {"status": "ready"}


def test_the_metrics_are_on_rays_own_endpoint(http: httpx2.Client, until: Until) -> None:
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
        text = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        return all(f"ray_{name}" in text for name in wanted)

    until(all_there, "all metrics are exported")


def test_the_shipped_configuration_is_one_that_serve_and_the_application_accept(repository: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load((repository / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(data)
    assert set(data) <= set(ServeDeploySchema.model_fields) and schema.http_options.host == "127.0.0.1"
    (application,) = data["applications"]
    assert application["import_path"] == "serve.app:build"
    assert ServeSettings.from_arguments(application["args"]) == ServeSettings()


def test_gateway_and_store_load_no_torch() -> None:
    code = "import sys, serve.api.deployment, serve.store.store; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
