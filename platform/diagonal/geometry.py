"""Chunk geometry: how latent frames, tokens and pixel frames of a video follow from each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from diagonal.errors import require


@dataclass(frozen=True)
class ChunkGeometry:
    """Shapes of one video model. Latents are `[b, channels, frames, height, width]`; a frame is a latent frame.

    The codec turns the first latent frame into one pixel frame and each later one into `temporal_stride`
    (Wan2.1: strides 4, 8, 8; patch 1, 2, 2; 21 frames in chunks of 3 make 81 pixel frames at 16 fps).
    """

    latent_channels: int = 16
    latent_height: int = 60
    latent_width: int = 104
    clip_frames: int = 21
    chunk_frames: int = 3
    patch_height: int = 2
    patch_width: int = 2
    temporal_stride: int = 4
    spatial_stride: int = 8
    pixel_fps: int = 16

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            require(isinstance(value, int) and value > 0, f"geometry.{name}", value, "a whole number above 0")
        require(
            self.clip_frames % self.chunk_frames == 0,
            "geometry.clip_frames",
            self.clip_frames,
            f"a multiple of geometry.chunk_frames = {self.chunk_frames}",
        )
        require(
            self.latent_height % self.patch_height == 0,
            "geometry.latent_height",
            self.latent_height,
            f"a multiple of geometry.patch_height = {self.patch_height}",
        )
        require(
            self.latent_width % self.patch_width == 0,
            "geometry.latent_width",
            self.latent_width,
            f"a multiple of geometry.patch_width = {self.patch_width}",
        )

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
