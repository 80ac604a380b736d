"""Settings of the model: its cache, its folder and text, and the networks that are trained from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diagonal.setting import NOT_NEGATIVE, POSITIVE, check, setting

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class CacheConfig:
    """Which latent frames a chunk attends to, in training as in serving."""

    window_frames: int = setting(
        12,
        "Frames in all: the attention sink, the newest ones, and the chunk itself.",
        "a multiple of geometry.chunk_frames, at least cache.sink_frames and one chunk",
    )
    sink_frames: int = setting(
        3, "First frames of the video, which stay in the window.", "0, or a multiple of geometry.chunk_frames"
    )


@dataclass(frozen=True)
class ModelConfig:
    """Where the base model lies, and how its text is read."""

    path: str = setting(
        "", "Folder of the base model in diffusers' layout, local or s3://; empty is the embedded model."
    )
    adapters: tuple[str, ...] = setting(
        (),
        "Files of LoRA that are merged into the student when it is loaded: paths, s3:// URIs, or hf://org/name/file.",
    )
    text_tokens: int = setting(512, "Length that prompts are cut or padded to.", POSITIVE, "tokens")
    negative_prompt: str = setting(WAN_NEGATIVE_PROMPT, "Prompt of the unguided side of the teacher.")
    compute_dtype: Literal["float32", "bfloat16"] = setting("bfloat16", "Number format of forwards.")

    def __post_init__(self) -> None:
        check(self, "model")


@dataclass(frozen=True)
class NetworkConfig:
    """The transformer that jobs/pretrain.py trains from nothing (embedded presets only)."""

    layers: int = setting(4, "Transformer blocks.", POSITIVE)
    heads: int = setting(4, "Attention heads of each block.", POSITIVE)
    head_dim: int = setting(32, "Width of one head.", POSITIVE)
    ffn_dim: int = setting(512, "Inner width of the feed-forward layers.", POSITIVE)
    frequency_dim: int = setting(128, "Width of the embedding of the noise level.", POSITIVE)
    text_dim: int = setting(64, "Width of the text encoder's output.", POSITIVE)

    def __post_init__(self) -> None:
        check(self, "network")


@dataclass(frozen=True)
class DecoderConfig:
    """The fast decoder's layout (model/fast_decoder.py), and how jobs/distill_decoder.py distils it.

    `widths` and `blocks` are by level; each level has twice the height and width of the one before.
    """

    widths: tuple[int, ...] = setting((256, 128, 64), "Channels of each level.")
    blocks: tuple[int, ...] = setting((3, 3, 2), "Residual blocks of each level.")
    clips: int = setting(512, "Clips of the release's student to learn from.", POSITIVE, "clips")
    crop_latents: int = setting(32, "Latents a side that clips are cut to; 0 is whole.", NOT_NEGATIVE)
    frames: int = setting(9, "Latent frames of one sample.", POSITIVE, "latent frames")
    updates: int = setting(20_000, "Optimizer updates.", POSITIVE)
    batch_size: int = setting(8, "Samples of an update.", POSITIVE)
    lr: float = setting(1e-3, "Learning rate.", POSITIVE)
    difference_weight: float = setting(
        1.0, "Weight of the error of differences between neighbouring pixels and frames.", NOT_NEGATIVE
    )
    checkpoint_every: int = setting(500, "Updates between two checkpoints.", POSITIVE, "updates")

    def __post_init__(self) -> None:
        check(self, "decoder")
