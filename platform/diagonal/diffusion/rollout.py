"""The denoising loop, one for training, serving and evaluation: a chunk, a rollout of chunks, and the re-cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.flow import blend, to_clean
from diagonal.diffusion.noise import Salt, batch_noise, generator
from diagonal.errors import require
from diagonal.geometry import ChunkGeometry
from diagonal.model.cache import CacheBatch, KVCache, new_cache, new_pool, on_device
from diagonal.model.dit import TextContext
from diagonal.schedule import StepSchedule

StepNoise = Callable[[int], Tensor]
Text = Tensor | TextContext  # embeddings `[b, l, n]`, or what `CausalWan.read` made of them


class Network(Protocol):
    """A causal generator: velocity `[b, c, f, h, w]` of a chunk at a level `[b, f]` given text and cached context."""

    def __call__(
        self, latents: Tensor, level: Tensor, text: Text, *, cache: CacheBatch | None = None, write: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True)
class DenoisedChunk:
    """One finished chunk. `clean` holds each sample's exit prediction (the only one with gradient).

    `written` is the input of the forward that wrote the cache, and `written_level` its level: what a re-cache needs
    (docs/method.md, context). Where `refreshed`, it ends with one frame more: the newest, clean, which was then written
    by itself. `finite`, `[b]` on the device, says of each sample whether its clean latents and what
    that forward gave are finite: K/V that are not would show there, as each token attends to itself.
    """

    clean: Tensor
    written: Tensor
    written_level: float
    forwards: int
    finite: Tensor
    refreshed: bool = False


def denoise_chunk(
    network: Network,
    schedule: StepSchedule,
    chunk: int,
    text: Text,
    cache: CacheBatch,
    noise: StepNoise,
    exit_steps: Sequence[int] | None = None,
) -> DenoisedChunk:
    """Denoise one chunk of a batch by its row of the schedule and write its K/V as the schedule's context says.

    `noise(step)` gives `[b, c, f, h, w]`. Between steps: predict clean, draw fresh noise, re-noise to the next level.
    With `exit_steps`, one a sample (training), that step alone carries the sample's gradient and its prediction is the
    sample; the steps after it still run, so that the cache is the one that serving sees. All samples must share the
    row of `chunk`. `FieldError` when an exit is not a step of the row.
    """
    levels, reuse = schedule.levels(chunk), schedule.context_of(chunk) == "reuse"
    last = len(levels) - 1
    for exit_step in exit_steps or ():
        require(0 <= exit_step <= last, "exit_step", exit_step, f"a step of chunk {chunk}: 0 to {last}")
    latents = noise(0)
    samples: list[Tensor] = [latents[:0]] * len(latents)
    for step, level in enumerate(levels):
        exiting = [number for number, exit_step in enumerate(exit_steps or ()) if exit_step == step]
        velocity = _velocity(network, latents, level, text, cache, reuse and step == last, exiting)
        clean = to_clean(latents, velocity, level)
        for number in exiting if exit_steps is not None else range(len(latents)):
            samples[number] = clean[number]
        written, clean = latents, clean.detach()
        if step < last:
            latents = blend(clean, noise(step + 1), levels[step + 1])
    if not reuse:
        context_level = schedule.context_level(chunk)
        written = blend(clean, noise(last + 1), context_level)
        with torch.no_grad():
            velocity = network(written, _levels(written, context_level), text, cache=cache, write=True)
    outcomes, refreshed = [clean, velocity.detach()], schedule.refreshes_newest(chunk)
    if refreshed:
        newest = clean[:, :, -1:]
        outcomes.append(_write_newest(network, newest, text, cache.tail(1, clean.shape[2])))
        written = torch.cat((written, newest), dim=2)
    finite = torch.stack([torch.isfinite(outcome).flatten(1).all(1) for outcome in outcomes]).all(0)
    sample = clean if exit_steps is None else torch.stack(samples)
    forwards = schedule.forwards(chunk) + refreshed
    return DenoisedChunk(sample, written, schedule.context_level(chunk), forwards, finite, refreshed)


@torch.no_grad()
def _write_newest(network: Network, newest: Tensor, text: Text, tail: CacheBatch) -> Tensor:
    """Cache a chunk's newest latent frame `[b, c, 1, h, w]` clean; it attends to the frames before it as cached."""
    return network(newest, _levels(newest, 0.0), text, cache=tail, write=True)


def _velocity(
    network: Network, latents: Tensor, level: float, text: Text, cache: CacheBatch, write: bool, exiting: Sequence[int]
) -> Tensor:
    """One step's velocity of a batch, with gradient for the `exiting` samples alone: of a mixed batch they run apart,
    so that nothing is kept for the backward pass of the others."""
    levels, others = _levels(latents, level), [n for n in range(len(latents)) if n not in exiting]
    if not exiting or not others:
        with torch.set_grad_enabled(bool(exiting) and torch.is_grad_enabled()):
            return network(latents, levels, text, cache=cache, write=write)
    assert isinstance(text, Tensor), "exits are of training, which hands over embeddings"
    parts = []
    for some in (exiting, others):
        with torch.set_grad_enabled(some is exiting and torch.is_grad_enabled()):
            parts.append(network(latents[some], levels[some], text[some], cache=cache.part(some), write=write))
    order = torch.tensor([*exiting, *others], device=latents.device).argsort()
    return torch.cat(parts)[order]


def _levels(latents: Tensor, level: float) -> Tensor:
    return torch.full((latents.shape[0], latents.shape[2]), level, dtype=torch.float32, device=latents.device)


def chunk_noise_of(
    geometry: ChunkGeometry, seeds: Sequence[int], chunks: Sequence[int], device: torch.device | str
) -> StepNoise:
    """Noise by step for one chunk of several samples, a function of (seed, chunk, step) alone."""
    shape = geometry.chunk_shape()[1:]
    return lambda step: on_device(batch_noise(seeds, chunks, step, shape), device)


@dataclass(frozen=True)
class Rollout:
    """A generated clip: clean latents `[b, c, f, h, w]` (with gradient where exit steps were given) and its cost."""

    clean: Tensor
    forwards: int


class RollOptions(TypedDict, total=False):
    """What a rollout may be told besides its text and seeds; see `roll`."""

    schedule: StepSchedule | None
    chunks: int | None
    exit_steps: Sequence[Sequence[int]] | None
    noise_steps: Callable[[int, int], int] | None
    prompt_changes: Mapping[int, Tensor] | None


def rollout(
    network: torch.nn.Module, config: Config, text: Tensor, seeds: Sequence[int], **options: Unpack[RollOptions]
) -> Rollout:
    """Generate clips chunk by chunk through a fresh cache; arguments as of `roll`."""
    rolled = ((done.clean, done.forwards) for done in roll(network, config, text, seeds, **options))
    parts, forwards = zip(*rolled, strict=True)
    return Rollout(torch.cat(parts, dim=2), sum(forwards))


def roll(
    network: torch.nn.Module,
    config: Config,
    text: Tensor,
    seeds: Sequence[int],
    *,
    schedule: StepSchedule | None = None,
    chunks: int | None = None,
    exit_steps: Sequence[Sequence[int]] | None = None,
    noise_steps: Callable[[int, int], int] | None = None,
    prompt_changes: Mapping[int, Tensor] | None = None,
) -> Iterator[DenoisedChunk]:
    """Chunk after chunk of a batch, so that a stream of any length needs no more memory than its window.

    `text` is `[b, l, n]`, one seed a sample. `exit_steps` gives each sample's exit steps of the last chunks, as many as
    it names (training; see `draw_exit_steps`): chunks before them run without gradient, and no page is recycled.
    `noise_steps(chunk, step)` gives the step whose noise is used instead of that step's own. `prompt_changes` gives by
    chunk the text from that chunk on: the kept chunks are then re-cached under it.
    """
    schedule, prompt_changes = schedule or config.schedule, prompt_changes or {}
    chunks = chunks or config.geometry.clip_chunks
    exits = list(zip(*exit_steps, strict=True)) if exit_steps is not None else []
    require(
        exit_steps is None or (len(exit_steps) == len(seeds) and 0 < len(exits) <= chunks),
        "exit_steps",
        exit_steps,
        f"for each of {len(seeds)} samples an exit step for each of the last chunks, {chunks} at most",
    )
    window = config.cache.window_frames // config.geometry.chunk_frames
    pool = new_pool(config, network, len(seeds) * (chunks if exit_steps is not None else min(chunks, window)))
    caches = [new_cache(config, pool, recycle=exit_steps is None) for _ in seeds]
    device, kept = pool.keys.device, list[tuple[int, DenoisedChunk]]()
    for chunk in range(chunks):
        if chunk in prompt_changes:
            text = prompt_changes[chunk]
            for sample, cache in enumerate(caches):
                past = [KeptChunk(at, done.written[sample], done.written_level, done.refreshed) for at, done in kept]
                recache(network, cache, past, text[sample : sample + 1])
        for cache in caches:
            cache.begin(chunk)
        drawn = chunk_noise_of(config.geometry, seeds, [chunk] * len(seeds), device)
        noise = drawn if noise_steps is None else partial(_renumbered, drawn, partial(noise_steps, chunk))
        own = exits[chunk - chunks] if chunk >= chunks - len(exits) else None
        done = denoise_chunk(network, schedule, chunk, text, CacheBatch(caches), noise, own)
        if prompt_changes:
            kept.append((chunk, done))
            if len(kept) >= window:
                del kept[caches[0].sink_chunks]
        yield done


def _renumbered(noise: StepNoise, number: Callable[[int], int], step: int) -> Tensor:
    return noise(number(step))


def draw_exit_steps(schedule: StepSchedule, chunks: Sequence[int], *key: int | str) -> list[int]:
    """One sample's exit step of each of those chunks, uniform in [0, s_k), from the key (run seed, role, sample)
    alone: however a batch is cut over ranks."""
    exit_steps = []
    for chunk in chunks:
        draw = generator(*key, Salt.EXIT, chunk)
        exit_steps.append(int(torch.randint(len(schedule.levels(chunk)), (1,), generator=draw)))
    return exit_steps


@dataclass(frozen=True)
class KeptChunk:
    """What a session keeps of a chunk in its window: the input `[c, f, h, w]` of the forward that wrote its K/V, and
    where `refreshed` behind it the newest frame that was written by itself."""

    chunk: int
    written: Tensor
    level: float
    refreshed: bool = False

    @property
    def frames(self) -> int:
        """Latent frames of the chunk itself."""
        return self.written.shape[1] - self.refreshed


@torch.no_grad()
def recache(network: Network, cache: KVCache, kept: Sequence[KeptChunk], text: Text) -> int:
    """Write the K/V of `kept` chunks anew, oldest first, block-causal, one forward each; returns the forwards.

    One mechanism for prompt change, resume and recovery (docs/method.md, context): exact before the first eviction;
    after it, kept chunks once attended to chunks that are gone. `text` is of one sample.
    """
    cache.close()
    for item in kept:
        cache.begin(item.chunk)
        written, batch = item.written.unsqueeze(0).to(cache.pool.keys.device), CacheBatch([cache])
        whole = written[:, :, : item.frames]
        network(whole, _levels(whole, item.level), text, cache=batch, write=True)
        if item.refreshed:
            _write_newest(network, written[:, :, item.frames :], text, batch.tail(1, item.frames))
    return len(kept)
