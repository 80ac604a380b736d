"""Floating-point operations of forwards, rollouts and whole updates: two for each multiply-add of a matrix product.

Elementwise work, norms and softmax are left out, and so is what is computed a second time for the backward pass: these
are the numbers that model-flops utilisation divides by time.
"""

from __future__ import annotations

from dataclasses import dataclass

from diagonal.config import Config
from diagonal.model.architecture import TransformerLayout
from diagonal.model.attention import stage0_mask
from diagonal.schedule import StepSchedule


def forward_flops(
    layout: TransformerLayout, tokens: int, key_tokens: float, text_tokens: int, time_rows: int = 1
) -> int:
    """One forward of one sample: `tokens` queries that see `key_tokens` keys each (on average) and the whole text.

    A block: 2*(6n*n + 2n*f) a token, 4n a query and key, 4n a query and text token, 4n*n a text token. Besides:
    patches, text embedding, time embedding of `time_rows` levels (a causal network has one a frame), output.
    """
    n, f = layout.hidden, layout.ffn_dim
    products = 2 * (6 * n * n + 2 * n * f) * tokens + 4 * n * n * text_tokens
    attention = 4 * n * tokens * (key_tokens + text_tokens)
    ends = 2 * n * (layout.in_channels + layout.out_channels) * layout.patch_values * tokens
    text = 2 * (layout.text_dim * n + n * n) * text_tokens
    time = 2 * (layout.frequency_dim * n + n * n + 6 * n * n) * time_rows
    return int(layout.layers * (products + attention) + ends + text + time)


def chunk_flops(layout: TransformerLayout, config: Config, chunk: int, frames: int | None = None) -> int:
    """One forward of that chunk of a stream (from 0), or of so many frames of it: its keys are the cached window's and
    its own."""
    geometry = config.geometry
    frames = frames or geometry.chunk_frames
    window = min((chunk + 1) * geometry.chunk_frames, config.cache.window_frames)
    keys = window * geometry.frame_tokens
    return forward_flops(layout, frames * geometry.frame_tokens, keys, config.model.text_tokens, frames)


def rollout_flops(
    layout: TransformerLayout, config: Config, schedule: StepSchedule | None = None, chunks: int | None = None
) -> int:
    """All forwards of `chunks` (a clip's) under a schedule (the configured one), context passes included."""
    schedule = schedule or config.schedule
    return sum(
        schedule.forwards(chunk) * chunk_flops(layout, config, chunk)
        + schedule.refreshes_newest(chunk) * chunk_flops(layout, config, chunk, frames=1)
        for chunk in range(chunks or config.geometry.clip_chunks)
    )


def clip_flops(layout: TransformerLayout, config: Config) -> int:
    """One forward of a whole clip in which everything sees everything (283 TF of Wan 1.3B at 832x480)."""
    tokens = config.geometry.clip_chunks * config.geometry.chunk_tokens
    return forward_flops(layout, tokens, tokens, config.model.text_tokens)


@dataclass(frozen=True)
class UpdateFlops:
    """Operations of one sample's share of an update: of the generator (when it learns) and of the critic."""

    generator: int
    critic: int
    generator_every: int

    @property
    def mean(self) -> float:
        """Of the average update: the critic learns in each, the generator in every `generator_every`-th."""
        return self.critic + self.generator / self.generator_every


def update_flops(config: Config, layout: TransformerLayout, teacher: TransformerLayout, stage: int) -> UpdateFlops:
    """Stage 0, 1 or 2, for one sample; a backward is twice its forward.

    Generator: a rollout, the backward of each chunk's exit forward, one clip forward of the critic and two of the
    guided teacher; in stage 2 the reference's rollout with stage 1's steps. Critic: a rollout, a forward, a backward.
    """
    if stage == 0:
        return UpdateFlops(3 * _regression_flops(config, layout), 0, 1)
    uniform = config.schedule.with_steps(config.distill.stage1_steps)
    rolled = _mean_rollout_flops(layout, config, uniform if stage == 1 else config.schedule)
    exits = sum(chunk_flops(layout, config, chunk) for chunk in range(config.geometry.clip_chunks))
    follows = stage == 2 and config.distill.loss.follows_reference
    reference = _mean_rollout_flops(layout, config, uniform) if follows else 0
    guided = 2 if config.distill.guidance != 1.0 else 1
    scores = clip_flops(layout, config) + guided * clip_flops(teacher, config)
    critic = rolled + 3 * clip_flops(layout, config)
    return UpdateFlops(rolled + 2 * exits + scores + reference, critic, config.distill.generator_every)


def _mean_rollout_flops(layout: TransformerLayout, config: Config, schedule: StepSchedule) -> int:
    """Of training's rollouts, whose lengths are drawn evenly from a clip's to `distill.rollout_chunks`."""
    clip = config.geometry.clip_chunks
    lengths = range(clip, max(clip, config.distill.rollout_chunks) + 1)
    return sum(rollout_flops(layout, config, schedule, chunks) for chunks in lengths) // len(lengths)


def _regression_flops(config: Config, layout: TransformerLayout) -> int:
    """One forward of a clip under stage 0's pattern."""
    pattern = stage0_mask(config)
    seen = sum(end - first for index in range(pattern.chunks) for first, end in pattern.spans(index))
    frames = config.geometry.clip_frames
    return forward_flops(layout, pattern.tokens, seen / pattern.chunks, config.model.text_tokens, frames)
