"""Settings of serving that belong to a release: what one engine replica holds, and the limits of the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diagonal.setting import NOT_NEGATIVE, POSITIVE, Allowed, check, setting


@dataclass(frozen=True)
class ServeConfig:
    """What one engine replica holds, how it computes, and the limits of the API."""

    max_sessions: int = setting(4, "Sessions with a cache at once.", POSITIVE)
    batch_sessions: int = setting(4, "Most sessions of one batch.", POSITIVE)
    max_prompt_characters: int = setting(1000, "Longest prompt.", POSITIVE)
    max_seconds: float = setting(300.0, "Longest video of a given length.", POSITIVE, "s")
    playout_lead_s: float = setting(1.0, "Media that a viewer has ahead before the next chunk is asked for.", POSITIVE)
    decoder_history_frames: int = setting(
        24, "Newest latent frames of a session that are kept to rebuild its decoder's state.", POSITIVE
    )
    pixel_scale: int = setting(1, "Pixels a side that each decoded pixel is shown as.", POSITIVE)
    budget_share: float = setting(
        0.9,
        "A session is admitted while the predicted busy time of each second of media stays below this.",
        Allowed("a number in (0, 1]", lambda share: 0.0 < share <= 1.0),
    )
    degraded_steps: str = setting(
        "", "Schedule of a new session that would not fit otherwise; empty is none.", "as schedule.steps"
    )
    max_paused_sessions: int = setting(64, "Sessions that wait without a cache, beside max_sessions.", NOT_NEGATIVE)
    max_paused_s: float = setting(600.0, "How long each of them may wait.", POSITIVE)
    reanchor_drift: float = setting(
        0.0,
        "A stream's cache is rebuilt from its sink and newest chunk when a measure of its pictures left that of its "
        "first chunks by this share (0.3 is 30 %); 0 is never.",
        NOT_NEGATIVE,
    )
    reanchor_every_chunks: int = setting(0, "The same after so many chunks; 0 is never.", NOT_NEGATIVE)
    decoder: Literal["full", "fast"] = setting("full", "The base model's decoder, or the release's small one.")
    decoder_layout: Literal["contiguous", "channels_last"] = setting(
        "contiguous", "Memory layout of the decoder's convolutions."
    )
    overlap_decode: bool = setting(False, "Decode one chunk while the GPU makes another one.")
    compile: bool = setting(False, "Compile the generator's blocks; on a GPU also capture its forwards as CUDA graphs.")
    compile_cache: str = setting("", "Folder that keeps what was compiled for the next start; empty keeps nothing.")
    attention: Literal["default", "auto", "flash", "cudnn", "efficient"] = setting(
        "default", "Attention kernel; auto measures the GPU's kernels at start."
    )
    linear_dtype: Literal["model", "fp8"] = setting("model", "Number format of the blocks' linear layers.")
    cache_dtype: Literal["model", "fp8"] = setting("model", "Number format of cached keys and values.")

    def __post_init__(self) -> None:
        check(self, "serve")
