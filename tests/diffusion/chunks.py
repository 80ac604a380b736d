"""Running chunks by hand through a cache, and reading what they left there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diagonal.diffusion.rollout import DenoisedChunk, StepNoise, chunk_noise_of, denoise_chunk
from diagonal.model.cache import KVCache
from diagonal.schedule import StepSchedule
from tests.networks import TEXT_DIM, TEXT_TOKENS, begun, draw, small_config

CONFIG = small_config()
SHAPE = CONFIG.geometry.chunk_shape()


def text_of(batch: int = 1, seed: int = 1) -> Tensor:
    return draw(batch, TEXT_TOKENS, TEXT_DIM, seed=seed)


def noise_of(seed: int, chunk: int) -> StepNoise:
    return chunk_noise_of(CONFIG.geometry, [seed], [chunk], "cpu")


def run(
    network: Any,
    cache: KVCache,
    chunk: int,
    *,
    steps: str = "4322222",
    context: Any = None,
    seed: int = 0,
    exit_step: int | None = None,
    clean_newest: bool = False,
    text: Tensor | None = None,
) -> DenoisedChunk:
    schedule = StepSchedule(steps, context=context, clean_newest=clean_newest)
    text = text_of() if text is None else text
    exits = None if exit_step is None else [exit_step]
    return denoise_chunk(network, schedule, chunk, text, begun(chunk, cache), noise_of(seed, chunk), exits)


def kv_of(cache: KVCache) -> Tensor:
    """Keys and values of the kept chunks, `[2, layers, chunks, tokens, heads, head_dim]`."""
    pages = list(cache.pages)
    return torch.stack((cache.pool.keys[:, pages], cache.pool.values[:, pages])).clone()
