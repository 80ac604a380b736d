"""Clips generated for captions: by a student, the teacher, or a world through the codec; and a first look at scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.noise import Salt, clip_noise, generator, mixed_seed
from diagonal.diffusion.rollout import rollout
from diagonal.diffusion.teacher import solve
from diagonal.errors import FieldError, require
from diagonal.evaluate.intervals import interval
from diagonal.evaluate.quality.worlds import World, world_for
from diagonal.model.base_model import load_codec, load_decoder, load_teacher, load_text
from diagonal.model.dit import CausalWan
from diagonal.model.release import Release
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder, decoder_of, encode_clips
from diagonal.schedule import StepSchedule

ScoreTable = dict[str, dict[str, Any]]
Make = Callable[[Sequence[str], Sequence[int]], Tensor]
CLIPS_PER_BATCH = 24


@dataclass(frozen=True)
class Student:
    """A causal student with what turns captions into its pixels; `schedule` is how it is sampled."""

    network: CausalWan
    text: TextEncoder
    decoder: Decoder
    config: Config
    schedule: StepSchedule

    @classmethod
    def of(cls, release: Release, schedule: StepSchedule | None = None, device: str = "cpu") -> Student:
        """A release's own student, by its own schedule or another one."""
        parts = release.generator(device), release.text(device), release.decoder(device)
        return cls(*parts, release.config, schedule or release.config.schedule)

    @property
    def forwards(self) -> float:
        """Forwards of a clip, in those of a whole chunk."""
        geometry = self.config.geometry
        return self.schedule.total_cost(geometry.clip_chunks, geometry.chunk_frames)

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Clips `[b, f, h, w, 3]` uint8 through the serving path's own loop."""
        with torch.no_grad():
            embeddings = self.text.encode(captions)
            clean = rollout(self.network, self.config, embeddings, seeds, schedule=self.schedule).clean
        return self.decoder.decode_clip(clean).cpu()


@dataclass(frozen=True)
class Teacher:
    """The guided bidirectional teacher in a base folder, by its ODE with `steps`; its noise is the student's first."""

    base: Path
    config: Config
    steps: int
    device: str = "cpu"

    @property
    def forwards(self) -> float:
        """Network calls of a clip; both branches of the guidance count."""
        return self.steps * (1 if self.config.pairs.guidance == 1.0 else 2)

    def load(self) -> Make:
        """Its networks in memory, as a function of captions and seeds."""
        config, device = self.config, self.device
        teacher, text = load_teacher(self.base, config).to(device), load_text(self.base, config).to(device)
        return teacher_maker(teacher, text, decoder_of(load_codec(self.base, config).to(device)), config, self.steps)


def teacher_maker(
    network: WanTransformer3DModel, text: TextEncoder, decoder: Decoder, config: Config, steps: int
) -> Make:
    """The guided ODE of a network in memory as a function of captions and seeds."""
    negative, device = text.encode([config.model.negative_prompt]), network.device
    shape, chunks = config.geometry.chunk_shape()[1:], config.geometry.clip_chunks

    def make(captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        noise = torch.stack([clip_noise(seed, chunks, shape) for seed in seeds]).to(device)
        states, _ = solve(
            network,
            noise,
            text.encode(captions),
            negative.expand(len(seeds), -1, -1),
            weight=config.pairs.guidance,
            steps=steps,
            shift=config.schedule.shift,
        )
        return decoder.decode_clip(states[:, -1]).cpu()

    return make


def codec_maker(base: Path, config: Config, world: World) -> Make:
    """The world's own clips after the codec: the ceiling of every score."""
    codec, decoder = load_codec(base, config), load_decoder(base, config)

    def make(captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        clips = [
            torch.from_numpy(world.render(caption, seed)).unsqueeze(0)
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        return torch.cat([decoder.decode_clip(encode_clips(codec, clip)) for clip in clips])

    return make


def draw_captions(clips: int, seed: int, known: Sequence[str]) -> list[str]:
    """That many captions, each of `known` once before any comes again, in an order of the seed."""
    require(clips >= 1, "clips", clips, "a whole number of at least 1")
    require(len(known) > 0, "prompts", list(known), "at least one prompt")
    order: list[str] = []
    while len(order) < clips:
        shuffled = torch.randperm(len(known), generator=generator(seed, Salt.SCENES, len(order)))
        order += [known[i] for i in shuffled.tolist()]
    return order[:clips]


def clip_seeds(clips: int, seed: int) -> list[int]:
    """The seed of each clip: equal noise for every source of one evaluation."""
    return [mixed_seed(seed, Salt.EVALUATE, index) for index in range(clips)]


def in_batches(make: Make, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """All clips `[n, f, h, w, 3]` uint8 of a source, a batch at a time."""
    starts = range(0, len(captions), CLIPS_PER_BATCH)
    return torch.cat([make(captions[i : i + CLIPS_PER_BATCH], seeds[i : i + CLIPS_PER_BATCH]) for i in starts])


def judge(pixels: Tensor, captions: Sequence[str], world: World) -> ScoreTable:
    """Mean oracle scores with 95 % intervals of clips `[b, f, h, w, 3]` uint8 against what they should show."""
    found = [world.score(clip.numpy(), caption) for clip, caption in zip(pixels, captions, strict=True)]
    return summary({name: [one[name] for one in found] for name in (*world.scores, *world.shown)}, world)


def summary(values: Mapping[str, Sequence[float]], world: World | None) -> ScoreTable:
    """Each figure's mean and interval; rates as the world says."""
    rates = world.rates if world else ()
    return {name: interval(some, name in rates).to_dict() for name, some in values.items() if len(some)}


def own_world(config: Config) -> World:
    """The world of a configuration that must have one."""
    world = world_for(config)
    if world is None:
        raise FieldError("preset", config.preset, "a preset whose world has an oracle, such as 'tiny'")
    return world


def score_release(release: Release, *, clips: int, seed: int) -> ScoreTable:
    """Oracle scores of a release's student over that many clips."""
    return _score(Student.of(release), release.config, clips, seed)


def score_teacher(base: Path, config: Config, *, clips: int, seed: int, steps: int | None = None) -> ScoreTable:
    """Oracle scores of the guided teacher over that many clips."""
    return _score(Teacher(base, config, steps or config.pairs.solver_steps).load(), config, clips, seed)


def _score(make: Make, config: Config, clips: int, seed: int) -> ScoreTable:
    world = own_world(config)
    captions = draw_captions(clips, seed, world.captions())
    return judge(in_batches(make, captions, clip_seeds(clips, seed)), captions, world)
