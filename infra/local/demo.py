"""The whole journey on this machine: distil on Ray, export, serve, stream demo.mp4 over HTTP, score it.

`make demo` runs it. Environment: KEEP=0 ends everything at the end, FROM_SCRATCH=1 trains every stage from nothing.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from numpy.typing import NDArray

from diagonal.client import DiagonalClient, DiagonalError, Video
from diagonal.client.files import write_whole
from diagonal.data.oracle import Reading, read_clip, score
from diagonal.data.world import Scene, WorldConfig
from infra.local import cluster, ports
from infra.local.run import LocalRun, load

# The seam to jobs/: the literal line. It makes a new folder under RUNS, with what is to be served in RELEASE.
DISTIL = "ray job submit -- python jobs/distill.py"
RUNS, RELEASE = "runs", "release"
# The seam to serve/: its configuration, whose first application takes the release, and the routes used below.
SERVE_CONFIG = "serve/config.yaml"
READY_ROUTE = "/health/ready"

SCENE = Scene("red", "circle", "right", "quickly")
SEED = 7
VIDEO = Path("demo.mp4")
FRAMES, FPS = 81, 16
PREFERRED_HTTP_PORT = 8000
JOB_LIMIT_S, SCRATCH_JOB_LIMIT_S = 1800.0, 8 * 3600.0
READY_LIMIT_S = 240.0
HEARTBEAT_S = 10.0
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours its lines for pipes too


class DemoError(RuntimeError):
    """A stage of the demo failed; the message says which and how."""


@dataclass(frozen=True)
class Options:
    """What the caller of `make demo` chose."""

    keep: bool
    from_scratch: bool

    @classmethod
    def from_environment(cls) -> "Options":
        return cls(_flag("KEEP", True), _flag("FROM_SCRATCH", False))


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name) or str(int(default))
    if value not in ("0", "1"):
        raise DemoError(f"{name} = {value!r}: allowed is 0 or 1")
    return value == "1"


@dataclass
class Progress:
    """Says what happens, and how long after the start."""

    started_s: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)


def start_ray(progress: Progress) -> LocalRun:
    """A local Ray: the one that is running, or a new one."""
    progress.say("starting Ray on this machine")
    try:
        run = cluster.start()
    except cluster.AlreadyRunningError as error:
        if not cluster.answers(error.run):
            raise DemoError(f"{error}, and it does not answer: end it first") from error
        progress.say(f"one is running already: {error.run.dashboard_url}")
        return error.run
    progress.say(f"dashboard {run.dashboard_url} (token in {run.token_path}), metrics {run.metrics_url}")
    return run


def run_job(run: LocalRun, line: str, limit_s: float, progress: Progress) -> None:
    """Run one command line in the repository's root and show its output; DemoError if it fails."""
    progress.say(f"$ {line}")
    job = subprocess.Popen(
        line.split(),
        cwd=run.root,
        env=os.environ | run.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    late = threading.Timer(limit_s, job.kill)
    late.start()
    try:
        assert job.stdout is not None
        for output in job.stdout:
            print(f"    {COLOUR.sub('', output)}", end="", flush=True)
        status = job.wait()
    finally:
        late.cancel()
        job.kill()
    if status != 0:  # the timer alone sends a signal
        raise DemoError(f"`{line}` " + (f"ended with {status}" if status > 0 else f"took more than {limit_s:g} s"))


def train(run: LocalRun, options: Options, progress: Progress) -> Path:
    """Run every training stage as one Ray job; returns the folder of the release."""
    before = set(_releases(run))
    line = f"{DISTIL} --from-scratch" if options.from_scratch else DISTIL
    run_job(run, line, SCRATCH_JOB_LIMIT_S if options.from_scratch else JOB_LIMIT_S, progress)
    made = sorted(set(_releases(run)) - before, key=lambda folder: folder.stat().st_mtime)
    if not made:
        raise DemoError(f"`{line}` made no {RUNS}/*/{RELEASE} in {run.root}")
    return made[-1]


def _releases(run: LocalRun) -> Iterator[Path]:
    return (Path(run.root) / RUNS).glob(f"*/{RELEASE}")


def deploy(
    run: LocalRun,
    release: Path,
    progress: Progress,
    arguments: Mapping[str, Any] | None = None,
    deployments: Sequence[Mapping[str, Any]] = (),
    patience_s: float = READY_LIMIT_S,
) -> LocalRun:
    """Deploy the release with Ray Serve on a free port of 127.0.0.1, and wait until it is ready.

    `arguments` and `deployments` are added to those of the application in serve/config.yaml.
    """
    port = int(run.service_url.rpartition(":")[2]) if run.service_url else ports.choose(PREFERRED_HTTP_PORT)
    config = yaml.safe_load((Path(run.root) / SERVE_CONFIG).read_text())
    config["http_options"] = (config.get("http_options") or {}) | {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    # Nobody judged this release yet; the demo shows it all the same.
    fresh = {"release": str(release), "allow_unpromoted": True}
    application["args"] = (application.get("args") or {}) | fresh | dict(arguments or {})
    application["deployments"] = [dict(one) for one in deployments]
    written = Path(run.folder) / "serve.yaml"
    written.write_text(yaml.safe_dump(config))
    progress.say(f"deploying {release} with Ray Serve on 127.0.0.1:{port}")
    run_job(run, f"serve deploy {written} --address {run.dashboard_url}", 120.0, progress)
    served = cluster.with_service(run, f"http://127.0.0.1:{port}")
    _wait_until_ready(served, release, progress, patience_s)
    return served


def _wait_until_ready(run: LocalRun, release: Path, progress: Progress, patience_s: float = READY_LIMIT_S) -> None:
    """Wait until Serve runs this release (an earlier one may still answer) and its gateway says that it is ready."""
    begun = told = time.monotonic()
    while True:
        found = applications(run)
        state = "; ".join(f"{a['name']} {a['status']} {a['message']}".strip() for a in found) or "no answer"
        if _serves(found, release) and _answers(f"{run.service_url}{READY_ROUTE}"):
            break
        now = time.monotonic()
        if "DEPLOY_FAILED" in state or now - begun > patience_s:
            raise DemoError(f"the service did not become ready in {now - begun:.0f} s: {state}")
        if now - told > HEARTBEAT_S:
            progress.say(f"waiting for the service: {state}")
            told = now
        time.sleep(0.5)
    progress.say(f"ready after {time.monotonic() - begun:.1f} s")


def _serves(applications: list[dict[str, Any]], release: Path) -> bool:
    configs = [one["deployed_app_config"] or {} for one in applications if one["status"] == "RUNNING"]
    return len(configs) == len(applications) > 0 and configs[0].get("args", {}).get("release") == str(release)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def applications(run: LocalRun) -> list[dict[str, Any]]:
    """What Serve says of its applications; empty where it does not answer."""
    request = urllib.request.Request(f"{run.dashboard_url}/api/serve/applications/")
    request.add_header("Authorization", f"Bearer {run.token_path.read_text()}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return list(json.load(response)["applications"].values())
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError, KeyError):
        return []


def fetch_video(run: LocalRun, progress: Progress) -> Video:
    """Ask the service for a video over HTTP and write it to demo.mp4 while it is made."""
    with DiagonalClient(run.service_url or "", api_key=run.service_key) as client:
        progress.say(f'POST /v1/videos "{SCENE.caption}", {FRAMES} frames, seed {SEED}')
        begun = time.monotonic()
        video = client.create(SCENE.caption, frames=FRAMES, seed=SEED)
        progress.say(f"GET /v1/videos/{video.id}/stream")
        write_whole(Path(run.root) / VIDEO, _timed(client.stream(video.id), begun, progress))
        took_s = time.monotonic() - begun
        progress.say(f"{VIDEO}: {video.size}, {FRAMES} frames in {took_s:.2f} s, {FRAMES / took_s:.1f} frames a second")
        return client.get(video.id)


def _timed(parts: Iterator[bytes], begun: float, progress: Progress) -> Iterator[bytes]:
    received = 0
    for part in parts:
        if received == 0:
            progress.say(f"first bytes after {time.monotonic() - begun:.3f} s")
        received += len(part)
        yield part
    progress.say(f"{received} bytes received")


def decode(path: Path) -> tuple[NDArray[np.uint8], float]:
    """Pixel frames, uint8 [f h w 3], and frames a second of a video file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames).astype(np.uint8), float(stream.average_rate or 0)


def reduced(pixels: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """The same frames, uint8 [f size size 3], each pixel the mean of the block that stands for it."""
    frames, height, width, channels = pixels.shape
    if height != width or height % size_px:
        raise DemoError(f"the video is {width}x{height}: allowed are multiples of {size_px}x{size_px}")
    scale = height // size_px
    blocks = pixels.reshape(frames, size_px, scale, size_px, scale, channels)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def judge(path: Path, progress: Progress) -> Reading:
    """Check that the file has the frames and the rate asked for, and print what the oracle reads in it."""
    pixels, fps = decode(path)
    if len(pixels) != FRAMES or round(fps, 3) != FPS:
        raise DemoError(f"{path} has {len(pixels)} frames at {fps:g} fps: allowed is {FRAMES} at {FPS}")
    world = WorldConfig()
    reading = read_clip(reduced(pixels, world.size_px), world)
    scores = score(reading, SCENE)
    progress.say(f"{path.name} holds {len(pixels)} frames at {fps:g} fps; the oracle reads:")
    for name in ("colour", "shape", "direction", "speed"):
        seen, wanted = getattr(reading, name) or "nothing", getattr(SCENE, name)
        print(f"    {name:<10} {getattr(scores, name):.0f}    {seen}{'' if seen == wanted else f', not {wanted}'}")
    for name in ("smoothness", "steadiness", "saturation"):
        print(f"    {name:<10} {getattr(scores, name):.2f}")
    return reading


def journey(options: Options, progress: Progress) -> LocalRun:
    """Every stage; returns the run with its service."""
    run = start_ray(progress)
    served = deploy(run, train(run, options, progress), progress)
    fetch_video(served, progress)
    judge(Path(run.root) / VIDEO, progress)
    return served


def main() -> int:
    """Run the demo; 0 when every stage held, 1 with a message and the place of the logs otherwise, 130 interrupted."""
    progress = Progress()
    earlier = load(cluster.REPOSITORY)
    ours = earlier is None or not earlier.members
    try:
        options = Options.from_environment()
        served = journey(options, progress)
    except (DemoError, cluster.ClusterError, DiagonalError, OSError) as error:
        progress.say(f"FAILED: {error}")
        _give_up(ours, progress)
        return 1
    except KeyboardInterrupt:
        progress.say("interrupted")
        _give_up(ours, progress)
        return 130
    progress.say(f"done: {VIDEO} is written")
    if options.keep:
        print(f"\n  watch and steer   {served.service_page}\n  logs              {served.logs}")
        print("  end it all        make stop")
    else:
        cluster.stop()
        progress.say("everything is ended")
    return 0


def _give_up(ours: bool, progress: Progress) -> None:
    """Say where the logs are; end the Ray that this demo started, not one that was there before."""
    run = load(cluster.REPOSITORY)
    if run is None:
        return
    if ours:
        cluster.stop(keep_logs=True)
    progress.say(f"logs: {cluster.kept_logs(run) if ours else run.logs}")


if __name__ == "__main__":
    sys.exit(main())
