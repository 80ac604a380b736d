"""The whole journey on this machine: serve, distil on Ray beside it, export, serve that too, stream demo.mp4, score it.

`make demo` runs it. Environment: KEEP=0 ends everything at the end, FROM_SCRATCH=1 trains every stage from nothing.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from diagonal.client import DiagonalClient, DiagonalError, Video
from diagonal.client.files import write_whole
from diagonal.data.oracle import Reading, read_clip, score
from diagonal.data.world import Scene, WorldConfig
from infra.local import cluster
from infra.local.run import LocalRun, load
from infra.local.service import Progress, ServiceError, deploy, run_job, start_ray

# The seam to jobs/: the literal line. It makes a new folder under RUNS, with what is to be served in RELEASE.
DISTIL = "ray job submit -- python jobs/distill.py"
RUNS, RELEASE = "runs", "release"
SHIPPED, DISTILLED = "shipped", "distilled"  # models of the service: the embedded release, then the one made here

SCENE = Scene("red", "circle", "right", "quickly")
SEED = 7
VIDEO = Path("demo.mp4")
FRAMES, FPS = 81, 16
JOB_LIMIT_S, SCRATCH_JOB_LIMIT_S = 1800.0, 8 * 3600.0


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
        raise ServiceError(f"{name} = {value!r}: allowed is 0 or 1")
    return value == "1"


def train(run: LocalRun, options: Options, progress: Progress) -> Path:
    """Run every training stage as one Ray job; returns the folder of the release."""
    before = set(_releases(run))
    line = f"{DISTIL} --from-scratch" if options.from_scratch else DISTIL
    run_job(run, line, SCRATCH_JOB_LIMIT_S if options.from_scratch else JOB_LIMIT_S, progress)
    made = sorted(set(_releases(run)) - before, key=lambda folder: folder.stat().st_mtime)
    if not made:
        raise ServiceError(f"`{line}` made no {RUNS}/*/{RELEASE} in {run.root}")
    return made[-1]


def _releases(run: LocalRun) -> Iterator[Path]:
    return (Path(run.root) / RUNS).glob(f"*/{RELEASE}")


def fetch_video(run: LocalRun, progress: Progress) -> Video:
    """Ask the service for a video over HTTP and write it to demo.mp4 while it is made."""
    with DiagonalClient(run.service_url or "", api_key=run.service_key) as client:
        progress.say(f'POST /v1/videos "{SCENE.caption}", {FRAMES} frames, seed {SEED}, model {DISTILLED}')
        begun = time.monotonic()
        video = client.create(SCENE.caption, frames=FRAMES, seed=SEED, model=DISTILLED)
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
        raise ServiceError(f"the video is {width}x{height}: allowed are multiples of {size_px}x{size_px}")
    scale = height // size_px
    blocks = pixels.reshape(frames, size_px, scale, size_px, scale, channels)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def judge(path: Path, progress: Progress) -> Reading:
    """Check that the file has the frames and the rate asked for, and print what the oracle reads in it."""
    pixels, fps = decode(path)
    if len(pixels) != FRAMES or round(fps, 3) != FPS:
        raise ServiceError(f"{path} has {len(pixels)} frames at {fps:g} fps: allowed is {FRAMES} at {FPS}")
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
    """Every stage; returns the run with its service. The page plays the embedded release while another is trained."""
    run = deploy(start_ray(progress), "", progress, {"model": SHIPPED})
    progress.say(f"watch and steer, while another release is distilled: {run.service_page}")
    made = train(run, options, progress)
    run = deploy(run, "", progress, {"model": SHIPPED}, beside={DISTILLED: made})
    fetch_video(run, progress)
    judge(Path(run.root) / VIDEO, progress)
    return run


def main() -> int:
    """Run the demo; 0 when every stage held, 1 with a message and the place of the logs otherwise, 130 interrupted."""
    progress = Progress()
    earlier = load(cluster.REPOSITORY)
    ours = earlier is None or not earlier.members
    try:
        options = Options.from_environment()
        served = journey(options, progress)
    except (ServiceError, cluster.ClusterError, DiagonalError, OSError) as error:
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
