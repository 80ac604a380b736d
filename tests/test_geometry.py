"""Chunk geometry: frames, tokens and pixel frames follow from each other."""

from __future__ import annotations

import pytest

from diagonal.errors import FieldError
from diagonal.geometry import ChunkGeometry


def test_wan_has_1560_tokens_a_frame_and_81_pixel_frames_a_clip() -> None:
    wan = ChunkGeometry()
    assert (wan.frame_tokens, wan.chunk_tokens, wan.clip_chunks * wan.chunk_tokens) == (1560, 4680, 32760)
    assert (wan.token_height, wan.token_width) == (30, 52)
    assert (wan.pixel_height, wan.pixel_width, wan.clip_pixel_frames, wan.pixel_fps) == (480, 832, 81, 16)
    assert wan.clip_shape(2) == (2, 16, 21, 60, 104)
    assert wan.chunk_shape() == (1, 16, 3, 60, 104)
    assert wan.frames_shape(5) == (1, 16, 5, 60, 104)


def test_the_first_chunk_shows_9_pixel_frames_and_every_later_one_12() -> None:
    wan = ChunkGeometry()
    assert [wan.chunk_pixel_frames(chunk) for chunk in range(5)] == [9, 12, 12, 12, 12]
    assert [wan.pixel_start(chunk) for chunk in range(5)] == [0, 9, 21, 33, 45]
    assert [wan.chunk_media_s(chunk) for chunk in (0, 1, 100)] == [0.5625, 0.75, 0.75]


@pytest.mark.parametrize(("chunk_frames", "stride"), [(3, 4), (1, 4), (5, 2), (2, 1)])
def test_chunks_for_is_the_least_number_that_shows_so_many_pixel_frames(chunk_frames: int, stride: int) -> None:
    geometry = ChunkGeometry(chunk_frames=chunk_frames, clip_frames=10 * chunk_frames, temporal_stride=stride)
    for wanted in range(1, 120):
        chunks = geometry.chunks_for(wanted)
        assert geometry.pixel_start(chunks - 1) < wanted <= geometry.pixel_start(chunks)


@pytest.mark.parametrize(("pixel_frames", "chunks"), [(1, 1), (9, 1), (10, 2), (81, 7), (82, 8)])
def test_chunks_for_wan(pixel_frames: int, chunks: int) -> None:
    assert ChunkGeometry().chunks_for(pixel_frames) == chunks


def test_no_pixel_frames_are_refused() -> None:
    with pytest.raises(FieldError, match="pixel_frames = 0: allowed is a whole number above 0"):
        ChunkGeometry().chunks_for(0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_frames", 20),
        ("latent_height", 61),
        ("latent_width", 105),
        ("patch_width", 0),
        ("latent_channels", -1),
        ("temporal_stride", 4.0),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(FieldError) as refused:
        ChunkGeometry(**{field: value})
    assert (refused.value.field, refused.value.value) == (f"geometry.{field}", value)
    assert refused.value.allowed
