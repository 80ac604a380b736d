"""Noise as a function of (seed, chunk, step): no generator state to carry, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Salt(StrEnum):
    """What randomness is for: equal seeds give each use numbers of its own. The texts are part of every result."""

    CLIPS = "clips"
    CODEC = "codec"
    DECODER_CLIPS = "decoder clips"
    DECODER_CROP = "decoder crop"
    DECODER_UPDATE = "decoder update"
    DRAW = "draw"
    EVALUATE = "evaluate"
    EXIT = "exit"
    FAST_DECODER = "fast decoder"
    FEATURES = "features"
    LENGTH = "length"
    ODE = "ode"
    ORDER = "order"
    PAIRS = "pairs"
    PRETRAIN = "pretrain"
    SAMPLES = "samples"
    SCENES = "scenes"
    STREAMS = "streams"
    TEACHER = "teacher"
    TEXT = "text"
    TEXT_PLACES = "text places"
    VAE = "vae"
    VAE_CLIPS = "vae clips"


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed of a tuple of numbers and names; nearby tuples give unrelated seeds."""
    plain = tuple(str(p) if isinstance(p, str) else int(p) for p in parts)  # numpy writes its numbers otherwise
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by a tuple."""
    return torch.Generator().manual_seed(mixed_seed(*parts))


def chunk_noise(seed: int, chunk: int, step: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample's chunk at one step, `shape` = `[c, f, h, w]`, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, chunk, step))


def batch_noise(seeds: Sequence[int], chunks: Sequence[int], step: int, shape: Sequence[int]) -> Tensor:
    """`chunk_noise` of several samples, `[b, c, f, h, w]`; a sample's noise does not depend on its neighbours."""
    return torch.stack([chunk_noise(s, c, step, shape) for s, c in zip(seeds, chunks, strict=True)])


def clip_noise(seed: int, chunks: int, shape: Sequence[int]) -> Tensor:
    """Initial noise (step 0) of a whole clip, `[c, chunks*f, h, w]` for chunks of `shape` = `[c, f, h, w]`."""
    return torch.cat([chunk_noise(seed, chunk, 0, shape) for chunk in range(chunks)], dim=1)
