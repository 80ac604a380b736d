"""Rates in process: what the network alone makes, and the network with its decoder, chunk by chunk, by schedule."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diagonal.config import Config
from diagonal.diffusion.rollout import KeptChunk
from diagonal.engine.chunk_maker import Emitted
from diagonal.engine.engine import Engine
from diagonal.engine.model_runner import ModelRunner, emit
from diagonal.engine.session import Session
from diagonal.engine.specs import SessionSpec
from diagonal.evaluate.bench.attention import synchronize
from diagonal.evaluate.bench.random_release import RandomRelease
from diagonal.model.architecture import TransformerLayout
from diagonal.model.flops import chunk_flops, rollout_flops
from diagonal.schedule import StepSchedule

Row = dict[str, Any]
Clock = Callable[[], float]
PROMPT = "a lighthouse at night, its beam sweeping over a calm sea, slow aerial shot"
_MATRIX = {"cuda": 8192, "cpu": 1024}  # sides of the product that is measured as the ceiling
_ROUNDS = 5


@dataclass(frozen=True)
class Variant:
    """A schedule and the latent frames that its chunks attend to."""

    name: str
    steps: str
    window_frames: int

    def schedule(self, config: Config) -> StepSchedule:
        context = None if self.steps == "self-forcing" else config.schedule.context
        return StepSchedule(self.steps, config.schedule.shift, context)


def variants(config: Config) -> list[Variant]:
    """The configured schedule, Self Forcing's at the same window and as published, and those of the paper's Table 3."""
    window, clip = config.cache.window_frames, config.geometry.clip_frames
    published = ("5433333", "5432222", "5333333", "4333333", "4322222", "4222222")
    table = [steps for steps in published if steps != config.schedule.steps]
    return [
        Variant(config.schedule.steps, config.schedule.steps, window),
        Variant("self-forcing", "self-forcing", window),
        Variant("self-forcing as published", "self-forcing", clip),
        *(Variant(steps, steps, window) for steps in table),
    ]


def ceiling_tflops(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """TFLOP/s of one large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    side = _MATRIX[device.type]
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    seconds = []
    for _ in range(_ROUNDS + 1):
        synchronize(device)
        started_s = clock()
        matrix @ matrix
        synchronize(device)
        seconds.append(clock() - started_s)
    return float(2 * side**3 / min(seconds[1:]) / 1e12)


class Stream:
    """One session driven by hand over a `ModelRunner`: no scheduler, no snapshots, a clock around each chunk."""

    def __init__(
        self, maker: ModelRunner, variant: Variant, *, decode: bool, clock: Clock = time.perf_counter, seed: int = 0
    ) -> None:
        self._maker, self._decode, self._clock = maker, decode, clock
        spec = SessionSpec("bench", PROMPT, seed, None, paced=False)
        self.session: Session = maker.new_session(spec, variant.schedule(maker.config))
        self.session.cache.window_chunks = variant.window_frames // maker.geometry.chunk_frames

    @torch.no_grad()
    def chunk_s(self) -> float:
        """Seconds of the next chunk: its forwards; with `decode` its pixels too, on the host."""
        device = self._maker.pool.keys.device
        synchronize(device)
        started_s = self._clock()
        self._maker.prepare(self.session)
        done = self._maker.denoise([self.session])
        if self._decode:
            (pixels,) = self._maker.decode([self.session], [done.clean[0]])
            if isinstance(pixels, Exception):
                raise pixels
            (shown,) = emit([pixels], [done.clean[0]], [done.written[0]], done.clean.dtype, [done.finite[0]])
            if not isinstance(shown, Emitted):
                raise shown
        synchronize(device)
        seconds = self._clock() - started_s
        chunk = self.session.progress.next_chunk
        kept = KeptChunk(chunk, done.written[0].cpu(), done.written_level, done.refreshed)
        self.session.latents.add(kept, done.clean[0].cpu(), self.session.cache, self.session.history_frames)
        self.session.progress.next_chunk += 1
        return seconds

    def close(self) -> None:
        self.session.cache.close()


def network_row(
    maker: ModelRunner,
    release: RandomRelease,
    variant: Variant,
    ceiling: float,
    steady_chunks: int,
    clock: Clock = time.perf_counter,
) -> Row:
    """The network alone, chunk by chunk: a clip from its first chunk (one to warm up, then the best of two), then the
    steady state of a full window."""
    clips, chunks = [], maker.geometry.clip_chunks
    for _ in range(3):
        stream = Stream(maker, variant, decode=False, clock=clock)
        clips.append([stream.chunk_s() for _ in range(chunks)])
        if len(clips) < 3:
            stream.close()
    steady = [stream.chunk_s() for _ in range(steady_chunks)]
    stream.close()
    return _rate_row(maker.config, release, variant, ceiling, min(clips[1:], key=sum), steady, decode=False)


def decoded_row(
    engine: Engine,
    release: RandomRelease,
    variant: Variant,
    ceiling: float,
    steady_chunks: int,
    clock: Clock = time.perf_counter,
) -> Row:
    """The engine's one unpaced stream, whose chunks are all asked for at its beginning: with `serve.overlap_decode` a
    GPU decodes each beside the next one's forwards. A chunk's time is from the one before it to its own pixels."""
    chunks, number = engine.geometry.clip_chunks, itertools.count()
    clips = [chunk_times_s(engine, f"clip-{next(number)}", chunks, clock) for _ in range(3)]
    steady = chunk_times_s(engine, f"clip-{next(number)}", chunks + steady_chunks, clock)[chunks:]
    return _rate_row(engine.config, release, variant, ceiling, min(clips[1:], key=sum), steady, decode=True)


def chunk_times_s(engine: Engine, session_id: str, chunks: int, clock: Clock) -> list[float]:
    """Seconds between the chunks of a stream of so many, the first from its opening."""
    frames, ends_s = engine.geometry.pixel_start(chunks), [clock()]
    engine.open(SessionSpec(session_id, PROMPT, 0, frames, paced=False))
    engine.request(session_id, chunks - 1)
    while len(ends_s) <= chunks:
        for result in engine.step():
            if result.error is not None:
                raise RuntimeError(result.error)
            ends_s.append(clock())
    engine.close(session_id)
    engine.step()
    return [late - early for early, late in itertools.pairwise(ends_s)]


def _rate_row(
    config: Config,
    release: RandomRelease,
    variant: Variant,
    ceiling: float,
    clip: Sequence[float],
    steady: Sequence[float],
    *,
    decode: bool,
) -> Row:
    geometry, schedule, steady_chunks = config.geometry, variant.schedule(config), len(steady)
    own = replace(config, cache=replace(config.cache, window_frames=variant.window_frames))
    layout = TransformerLayout.of(release.layout)
    flops = rollout_flops(layout, own, schedule)
    last = geometry.clip_chunks + steady_chunks
    steady_flops = schedule.forwards(last) * chunk_flops(layout, own, last)
    return {
        "name": variant.name,
        "what": "DiT + VAE" if decode else "DiT only",
        "window_frames": variant.window_frames,
        "context": schedule.resolved_context,
        "forwards": sum(schedule.forwards(chunk) for chunk in range(geometry.clip_chunks)),
        "clip_s": sum(clip),
        "clip_fps": geometry.clip_pixel_frames / sum(clip),
        "first_chunk_s": clip[0],
        "clip_tflop": flops / 1e12,
        "steady_fps": geometry.chunk_pixel_frames(last) / statistics.median(steady),
        "steady_chunk": last,
        "steady_tflop": steady_flops / 1e12,
        **percentiles(steady),
        "ceiling_share": None if decode else steady_flops / 1e12 / statistics.median(steady) / ceiling,
        "floor_clip_s": flops / 1e12 / ceiling,
        "floor_steady_fps": geometry.chunk_pixel_frames(last) * ceiling / (steady_flops / 1e12),
    }


def percentiles(seconds: Sequence[float]) -> Row:
    """p50, p95 and p99 of chunk times, in milliseconds."""
    ordered = sorted(seconds)
    at = {f"p{share}_ms": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] * 1e3 for share in (50, 95, 99)}
    return {**at, "chunks": len(ordered)}


def growth_row(
    maker: ModelRunner,
    variant: Variant,
    early: int,
    late: int,
    clock: Clock = time.perf_counter,
    around: int = 8,
    rounds: int = 3,
) -> Row:
    """Time and memory of a stream's chunks about number `early` and about number `late`.

    The early ones are of further streams before and after the long one, so that a machine whose speed wanders is not
    taken for a stream that grows: as many chunks as of the late ones.
    """
    memory = {}

    def times_s(last: int) -> list[float]:
        stream, seconds = Stream(maker, variant, decode=True, clock=clock), []
        for chunk in range(last + 1):
            seconds.append(stream.chunk_s())
            if chunk in (early, late):
                memory[chunk] = held_bytes(maker.pool.keys.device)
        stream.close()
        return seconds

    def young_s() -> list[float]:
        return [second for _ in range(rounds) for second in times_s(early + around // 2)[-around:]]

    before, old = young_s(), times_s(late)[-2 * rounds * around :]
    first, last = statistics.median(before + young_s()), statistics.median(old)
    return {
        "name": f"chunk {late} against chunk {early}",
        "early_ms": first * 1e3,
        "late_ms": last * 1e3,
        "time_ratio": last / first,
        "early_bytes": memory[early],
        "late_bytes": memory[late],
        "memory_ratio": memory[late] / memory[early] if memory[early] else None,
    }


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on the GPU; on a CPU what the process holds in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
