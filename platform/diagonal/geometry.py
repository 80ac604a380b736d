"""Chunk geometry: how latent frames, tokens and pixel frames of a video follow from each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from diagonal.errors import require
from diagonal.setting import Allowed, check, setting

_WHOLE = Allowed("a whole number above 0", lambda value: isinstance(value, int) and value > 0)
_MULTIPLES = {"clip_frames": "chunk_frames", "latent_height": "patch_height", "latent_width": "patch_width"}


@dataclass(frozen=True)
class ChunkGeometry:
    """Shapes of one video model. Latents are `[b, channels, frames, height, width]`; a frame is a latent frame.

    The codec turns the first latent frame into one pixel frame and each later one into `temporal_stride`
    (Wan2.1: strides 4, 8, 8; patch 1, 2, 2; 21 frames in chunks of 3 make 81 pixel frames at 16 fps).
    """

    latent_channels: int = setting(16, "Channels of a latent.", _WHOLE)
    latent_height: int = setting(60, "Latents of a column; a multiple of patch_height.", _WHOLE)
    latent_width: int = setting(104, "Latents of a row; a multiple of patch_width.", _WHOLE)
    clip_frames: int = setting(21, "Frames of a training clip; a multiple of chunk_frames.", _WHOLE)
    chunk_frames: int = setting(3, "Frames of a chunk.", _WHOLE)
    patch_height: int = setting(2, "Latents of a token, downwards.", _WHOLE)
    patch_width: int = setting(2, "Latents of a token, sideways.", _WHOLE)
    temporal_stride: int = setting(4, "Pixel frames of each latent frame but the first.", _WHOLE)
    spatial_stride: int = setting(8, "Pixels a side of a latent.", _WHOLE)
    pixel_fps: int = setting(16, "Pixel frames a second.", _WHOLE)

    def __post_init__(self) -> None:
        check(self, "geometry")
        for name, divisor in _MULTIPLES.items():
            value, unit = getattr(self, name), getattr(self, divisor)
            require(value % unit == 0, f"geometry.{name}", value, f"a multiple of geometry.{divisor} = {unit}")

    @property
    def clip_chunks(self) -> int:
        """Chunks of a training clip (7)."""
        return self.clip_frames // self.chunk_frames

    @property
    def token_height(self) -> int:
        return self.latent_height // self.patch_height

    @property
    def token_width(self) -> int:
        return self.latent_width // self.patch_width

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame (1560 at 832x480)."""
        return self.token_height * self.token_width

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * self.frame_tokens

    @property
    def pixel_height(self) -> int:
        return self.latent_height * self.spatial_stride

    @property
    def pixel_width(self) -> int:
        return self.latent_width * self.spatial_stride

    @property
    def clip_pixel_frames(self) -> int:
        """Pixel frames of a training clip (81)."""
        return self.pixel_start(self.clip_chunks)

    def frames_shape(self, frames: int, batch: int = 1) -> tuple[int, int, int, int, int]:
        """Shape `[b, c, f, h, w]` of that many latent frames."""
        return (batch, self.latent_channels, frames, self.latent_height, self.latent_width)

    def chunk_shape(self, batch: int = 1) -> tuple[int, int, int, int, int]:
        """Shape `[b, c, f, h, w]` of one chunk of latents."""
        return self.frames_shape(self.chunk_frames, batch)

    def clip_shape(self, batch: int = 1) -> tuple[int, int, int, int, int]:
        """Shape `[b, c, f, h, w]` of one training clip of latents."""
        return self.frames_shape(self.clip_frames, batch)

    def pixel_start(self, chunk: int) -> int:
        """Index of the first pixel frame that chunk (from 0) decodes to: 0, 9, 21, 33, ..."""
        return 0 if chunk == 0 else 1 + (chunk * self.chunk_frames - 1) * self.temporal_stride

    def chunk_pixel_frames(self, chunk: int) -> int:
        """Pixel frames of that chunk: 9 for the first, 12 for every later one."""
        return self.pixel_start(chunk + 1) - self.pixel_start(chunk)

    def chunks_for(self, pixel_frames: int) -> int:
        """Chunks that must be generated to show that many pixel frames; the surplus of the last is dropped."""
        require(pixel_frames >= 1, "pixel_frames", pixel_frames, "a whole number above 0")
        latent_frames = 1 + ceil((pixel_frames - 1) / self.temporal_stride)
        return ceil(latent_frames / self.chunk_frames)

    def chunk_media_s(self, chunk: int) -> float:
        """Seconds of video in that chunk: 0.5625 for the first, 0.75 for every later one at 16 fps."""
        return self.chunk_pixel_frames(chunk) / self.pixel_fps
