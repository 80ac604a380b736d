"""Sections of the configuration for training from nothing, and the checks that every section shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from diagonal.errors import require


def positive(owner: object, prefix: str, *names: str) -> None:
    for name in names:
        require(getattr(owner, name) > 0, f"{prefix}.{name}", getattr(owner, name), "a number above 0")


def not_negative(owner: object, prefix: str, *names: str) -> None:
    for name in names:
        require(getattr(owner, name) >= 0, f"{prefix}.{name}", getattr(owner, name), "a number of at least 0")


def shares(owner: object, prefix: str, *names: str) -> None:
    for name in names:
        require(0.0 <= getattr(owner, name) < 1.0, f"{prefix}.{name}", getattr(owner, name), "a number in [0, 1)")


@dataclass(frozen=True)
class NetworkConfig:
    """A transformer to be trained from nothing by jobs/pretrain.py (embedded preset only)."""

    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    ffn_dim: int = 512
    frequency_dim: int = 128
    text_dim: int = 64

    def __post_init__(self) -> None:
        positive(self, "network", *(field.name for field in dataclasses.fields(self)))


@dataclass(frozen=True)
class PretrainConfig:
    """Teacher training from nothing on an embedded world.

    Of the codec's latent channels `motion_channels` are for what changes within a latent frame. The text encoder stays
    random with 0 `text_updates`, and the codec is the linear one with 0 `codec_updates`. Every `score_every` updates
    the oracle judges the teacher (0: at the end alone).
    """

    world: Literal["shapes", "textured"] = "shapes"
    clips: int = 4096
    updates: int = 5500
    batch_size: int = 24
    lr: float = 2.5e-3
    level_shift: float = 3.0
    caption_drop: float = 0.1
    ema_decay: float = 0.995
    codec_clips: int = 384
    codec_width: int = 12
    codec_updates: int = 1000
    codec_lr: float = 2e-3
    motion_channels: int = 6
    text_updates: int = 0
    checkpoint_every: int = 500
    score_every: int = 0

    def __post_init__(self) -> None:
        positive(self, "pretrain", "clips", "updates", "batch_size", "lr", "codec_clips", "motion_channels")
        positive(self, "pretrain", "checkpoint_every")
        not_negative(self, "pretrain", "text_updates", "codec_updates", "score_every")
        shares(self, "pretrain", "caption_drop", "ema_decay")
