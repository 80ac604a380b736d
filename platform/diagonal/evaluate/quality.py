"""Quality on the embedded world: clips generated for its captions, judged by its exact oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.data.oracle import mean_scores, read_clip, score
from diagonal.data.world import Scene, all_scenes, render, world_of
from diagonal.diffusion.noise import clip_noise, generator, mixed_seed
from diagonal.diffusion.rollout import rollout
from diagonal.diffusion.teacher import solve
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder, decoder_of, encode_clips
from diagonal.model.weights import Release, load_codec, load_decoder, load_teacher, load_text
from diagonal.schedule import StepSchedule

ScoreTable = dict[str, dict[str, float]]
CLIPS_PER_BATCH = 24


def draw_scenes(clips: int, seed: int, scenes: Sequence[Scene] | None = None) -> list[Scene]:
    """That many scenes, each of `scenes` (default: all) once before any comes again, in an order of the seed."""
    known = list(scenes or all_scenes())
    order: list[Scene] = []
    while len(order) < clips:
        shuffled = torch.randperm(len(known), generator=generator(seed, "scenes", len(order)))
        order += [known[i] for i in shuffled.tolist()]
    return order[:clips]


def judge(pixels: Tensor, scenes: Sequence[Scene], config: Config) -> ScoreTable:
    """Mean oracle scores with 95 % half-widths of clips `[b, f, h, w, 3]` uint8 against the scenes they should show."""
    world = world_of(config)
    readings = [score(read_clip(clip.numpy(), world), scene) for clip, scene in zip(pixels, scenes, strict=True)]
    return mean_scores(readings)


def student_clips(
    network: CausalWan,
    text: TextEncoder,
    decoder: Decoder,
    config: Config,
    scenes: Sequence[Scene],
    seed: int,
    schedule: StepSchedule | None = None,
) -> Tensor:
    """Clips `[b, f, h, w, 3]` uint8 of the causal student by the schedule, through the serving path's own loop."""
    parts = []
    for start in range(0, len(scenes), CLIPS_PER_BATCH):
        batch = scenes[start : start + CLIPS_PER_BATCH]
        seeds = [_seed(seed, start + i) for i in range(len(batch))]
        with torch.no_grad():
            embeddings = text.encode([scene.caption for scene in batch])
            clean = rollout(network, config, embeddings, seeds, schedule=schedule).clean
        parts.append(decoder.decode_clip(clean).cpu())
    return torch.cat(parts)


def score_release(release: Release, *, clips: int, seed: int, schedule: StepSchedule | None = None) -> ScoreTable:
    """Oracle scores of a release's student over that many clips."""
    scenes = draw_scenes(clips, seed)
    pixels = student_clips(
        release.generator(), release.text(), release.decoder(), release.config, scenes, seed, schedule
    )
    return judge(pixels, scenes, release.config)


def teacher_clips(
    base: Path, config: Config, scenes: Sequence[Scene], seed: int, steps: int | None = None
) -> Tensor:
    """Clips `[b, f, h, w, 3]` uint8 of the guided teacher by its ODE with `steps` (default: as for the pairs).

    Noise is the student's first noise of the same seed.
    """
    teacher, text, decoder = load_teacher(base, config), load_text(base, config), load_decoder(base, config)
    negative, parts = text.encode([config.model.negative_prompt]), []
    shape, chunks = config.geometry.chunk_shape()[1:], config.geometry.clip_chunks
    for start in range(0, len(scenes), CLIPS_PER_BATCH):
        batch = scenes[start : start + CLIPS_PER_BATCH]
        noise = torch.stack([clip_noise(_seed(seed, start + i), chunks, shape) for i in range(len(batch))])
        states, _ = solve(
            teacher, noise, text.encode([scene.caption for scene in batch]), negative.expand(len(batch), -1, -1),
            weight=config.pairs.guidance, steps=steps or config.pairs.solver_steps, shift=config.schedule.shift,
        )
        parts.append(decoder.decode_clip(states[:, -1]).cpu())
    return torch.cat(parts)


def score_teacher(base: Path, config: Config, *, clips: int, seed: int, steps: int | None = None) -> ScoreTable:
    """Oracle scores of the guided teacher over that many clips."""
    scenes = draw_scenes(clips, seed)
    return judge(teacher_clips(base, config, scenes, seed, steps), scenes, config)


def codec_clips(base: Path, config: Config, scenes: Sequence[Scene], seed: int) -> Tensor:
    """The world's own clips `[b, f, h, w, 3]` uint8 after the codec: the ceiling of every score."""
    codec, world = load_codec(base, config), world_of(config)
    decoder, parts = decoder_of(codec), []
    for index, scene in enumerate(scenes):
        clip = torch.from_numpy(render(scene, _seed(seed, index), world)).unsqueeze(0)
        parts.append(decoder.decode_clip(encode_clips(codec, clip)))
    return torch.cat(parts)


def _seed(seed: int, index: int) -> int:
    return mixed_seed(seed, "evaluate", index)
