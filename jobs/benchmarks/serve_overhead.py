"""What the service costs: unpaced clips received by a client over HTTP, against the same made in this process.

    python -m jobs.benchmarks.serve_overhead --url http://127.0.0.1:8000 --out docs/results/serving-in-process.json

The service runs on this machine already, idle, with one replica of the same release. In both ways one thread generates,
pinned to one CPU, and everything else (encoding; Ray, gateway, store, client) is pinned to the others. In this process
that is the engine and an encoder to fragmented MP4, nothing more. Both are measured in turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from diagonal.client import DiagonalClient, DiagonalError
from diagonal.engine.engine import Engine
from diagonal.engine.specs import SessionSpec
from diagonal.errors import FieldError, require
from diagonal.evaluate.environment import system_description, this_command
from diagonal.evaluate.load.figures import percentiles
from diagonal.evaluate.load.page import against_text
from diagonal.jsonfile import write_json
from diagonal.media.encode import ChunkEncoder
from diagonal.model.release import Release
from diagonal.mp4 import read_fragment, split

PROMPT = "a red circle moving right quickly"
REPLICA = "ray::ServeReplica"


@dataclass(frozen=True)
class Clip:
    """One clip of which `first_frames` came first: when they were there, and when all was, in s from the request."""

    frames: int
    first_frames: int
    first_frame_s: float
    took_s: float

    @property
    def fps(self) -> float:
        """Frames a second from the first chunk on, without it: what comes before is the time to first frame."""
        return (self.frames - self.first_frames) / (self.took_s - self.first_frame_s)

    @property
    def clip_fps(self) -> float:
        """Frames a second of the whole clip, from the request on."""
        return self.frames / self.took_s


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmarks.serve_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--release", default="", help="the service's own (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=5, help="of each way in a round (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="each way in turns (default: 5)")
    parser.add_argument("--frames", type=int, default=81, help="of a clip (default: 81)")
    parser.add_argument("--engine-cpu", type=int, default=0, help="where generation runs (default: 0)")
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    found = parser.parse_args(argv)
    for name in ("clips", "rounds", "frames"):
        require(getattr(found, name) >= 1, f"--{name}", getattr(found, name), "a whole number of at least 1")
    cpus = os.sched_getaffinity(0)
    require(
        len(cpus) > 1 and found.engine_cpu in cpus,
        "--engine-cpu",
        found.engine_cpu,
        f"one of {sorted(cpus)}, which are two or more",
    )
    return found


class InProcess:
    """An engine on the calling thread, pinned while it works; an encoder on another one."""

    def __init__(self, release: Release, engine_cpu: int, other_cpus: set[int]) -> None:
        self._engine, self._cpus, self._others = Engine(release), {engine_cpu}, other_cpus
        self._config = release.config
        self._encoding = ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, other_cpus))
        self._numbers = itertools.count()
        self._engine.warm_up()

    def clip(self, frames: int, seed: int) -> Clip:
        os.sched_setaffinity(0, self._cpus)
        try:
            return self._clip(f"clip-{next(self._numbers)}", frames, seed)
        finally:
            os.sched_setaffinity(0, self._others)

    def _clip(self, name: str, frames: int, seed: int) -> Clip:
        geometry, began_s = self._config.geometry, time.monotonic()
        self._engine.open(SessionSpec(name, PROMPT, seed, frames, paced=False))
        encoder = ChunkEncoder(
            geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps, scale=self._config.serve.pixel_scale
        )
        done: list[Future[float]] = []
        last, first_frames = False, geometry.chunk_pixel_frames(0)
        while not last:
            self._engine.request(name)
            for result in self._engine.step():
                done.append(self._encoding.submit(_encode, encoder, result.pixels))
                last = result.last
        self._engine.close(name)
        ends_s = [one.result(60) for one in done]
        return Clip(frames, first_frames, ends_s[0] - began_s, ends_s[-1] - began_s)


def _encode(encoder: ChunkEncoder, pixels: Any) -> float:
    """Encode a chunk; when it was done."""
    encoder.encode_chunk(pixels.numpy())
    return time.monotonic()


def received(client: DiagonalClient, frames: int, seed: int) -> Clip:
    """A clip of the service."""
    began_s, first_s, first_frames, took_s = time.monotonic(), 0.0, 0, 0.0
    video = client.create(PROMPT, frames=frames, seed=seed, pacing="none")
    for part in client.stream(video.id):
        if not first_frames and (media := split(part)[1]):
            first_s, first_frames = time.monotonic(), read_fragment(media).frames
        took_s = time.monotonic() - began_s  # of the newest part: the stream ends when the file is made, too
    client.delete(video.id)
    require(0 < first_frames < frames, "--frames", frames, "more than one chunk holds")
    return Clip(frames, first_frames, first_s - began_s, took_s)


@contextmanager
def pinned_service(client: DiagonalClient, frames: int, engine_cpu: int, other_cpus: set[int]) -> Iterator[None]:
    """Pin the service's engine thread, the one that a clip keeps busiest, to its CPU, and all around it elsewhere."""
    replicas = [process for process in psutil.process_iter(["cmdline"]) if _is_replica(process)]
    before = _cpu_s(replicas)
    received(client, frames, seed=0)
    used = {thread: cpu_s - before.get(thread, 0.0) for thread, cpu_s in _cpu_s(replicas).items()}
    require(bool(used), "--url", REPLICA, "a service on this machine")
    process_id, engine = max(used, key=lambda thread: used[thread])
    raylet = psutil.Process(process_id).parent()
    assert raylet is not None  # it starts its workers
    try:
        _pin(raylet, engine, {engine_cpu}, other_cpus)
        yield
    finally:
        everywhere = {engine_cpu} | other_cpus
        _pin(raylet, engine, everywhere, everywhere)


def _pin(raylet: psutil.Process, engine: int, engine_cpus: set[int], other_cpus: set[int]) -> None:
    """Tell every thread of a Ray node's processes where it may run."""
    for process in (raylet, *raylet.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # Ray's idle workers come and go
            for thread in process.threads():
                os.sched_setaffinity(thread.id, engine_cpus if thread.id == engine else other_cpus)


def _is_replica(process: psutil.Process) -> bool:
    title = " ".join(process.info["cmdline"] or ())
    return title.startswith(REPLICA) and ":Replica" in title


def _cpu_s(processes: Sequence[psutil.Process]) -> dict[tuple[int, int], float]:
    """CPU time by process and thread."""
    return {
        (process.pid, thread.id): thread.user_time + thread.system_time
        for process in processes
        for thread in process.threads()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Clips of both ways, in an order that alternates by round."""
    others = os.sched_getaffinity(0) - {options.engine_cpu}
    torch.set_num_threads(1)
    os.sched_setaffinity(0, others)
    here = InProcess(Release.load(options.release or None), options.engine_cpu, others)
    clips: dict[str, list[list[Clip]]] = {"in_process": [], "service": []}
    with DiagonalClient(options.url) as client, pinned_service(client, options.frames, options.engine_cpu, others):
        ways = {"in_process": here.clip, "service": lambda frames, seed: received(client, frames, seed)}
        for way in ways.values():
            way(options.frames, 1)  # not counted
        for number in range(options.rounds):
            for name in sorted(ways, reverse=number % 2 == 1):
                clips[name].append([ways[name](options.frames, seed) for seed in range(options.clips)])
                _say(f"round {number + 1}/{options.rounds}, {name}", clips[name][-1])
    return figures(clips)


def figures(clips: dict[str, list[list[Clip]]]) -> dict[str, Any]:
    """Both ways, and what one is to the other: the median of the rounds' own."""
    rounds = list(zip(clips["in_process"], clips["service"], strict=True))
    found: dict[str, Any] = {
        name: {
            "fps": percentiles(clip.fps for clip in _all(of)),
            "clip_fps": percentiles(clip.clip_fps for clip in _all(of)),
            "first_frame_s": percentiles(clip.first_frame_s for clip in _all(of)),
        }
        for name, of in clips.items()
    }
    return found | {
        "fps_ratio": statistics.median(_median(there, "fps") / _median(here, "fps") for here, there in rounds),
        "clip_fps_ratio": statistics.median(
            _median(there, "clip_fps") / _median(here, "clip_fps") for here, there in rounds
        ),
        "first_frame_later_s": statistics.median(
            _median(there, "first_frame_s") - _median(here, "first_frame_s") for here, there in rounds
        ),
    }


def _all(rounds: Sequence[Sequence[Clip]]) -> Iterator[Clip]:
    return itertools.chain.from_iterable(rounds)


def _median(clips: Sequence[Clip], name: str) -> float:
    return statistics.median(float(getattr(clip, name)) for clip in clips)


def _say(what: str, clips: Sequence[Clip]) -> None:
    first_ms = 1000 * _median(clips, "first_frame_s")
    print(f"{what}: {_median(clips, 'fps'):.1f} frames a second, first one after {first_ms:.0f} ms", flush=True)


def main() -> int:
    """0 when both were measured, 2 otherwise."""
    try:
        options = arguments(sys.argv[1:])
        about = system_description(this_command("jobs.benchmarks.serve_overhead")) | {"kind": "in-process"}
        asked = {name: getattr(options, name) for name in ("clips", "rounds", "frames", "engine_cpu")}
        found = about | asked | measure(options)
        print(against_text(found))
        if options.out:
            write_json(options.out, found)
    except (FieldError, DiagonalError, OSError, psutil.Error) as error:
        print(f"jobs.benchmarks.serve_overhead: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
