"""Laws of the textured world's oracle: it reads the world's own clips, and a corruption moves the score it hurts."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from diagonal.data import textured, textured_oracle
from diagonal.data.textured import ATTRIBUTES, TexturedScene
from diagonal.data.textured_oracle import read_clip, score
from diagonal.data.world import SHAPES, Pixels, WorldConfig
from diagonal.model.vae import LinearCodec

SIZE = WorldConfig(size_px=48, edge="bounce")
COUNT = 16
Clips = tuple[list[TexturedScene], Pixels]


@pytest.fixture(scope="module")
def clips() -> Clips:
    captions, drawn = textured.sample_clips(3, COUNT, SIZE)
    return [TexturedScene.parse(caption) for caption in captions], drawn


def means(scenes: list[TexturedScene], drawn: Pixels) -> dict[str, float]:
    found = [asdict(score(read_clip(clip, SIZE), scene, SIZE)) for clip, scene in zip(drawn, scenes, strict=True)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


@pytest.mark.slow
def test_the_worlds_own_clips_are_read_without_error(clips: Clips) -> None:
    found = means(*clips)
    assert {name: found[name] for name in ATTRIBUTES} == dict.fromkeys(ATTRIBUTES, 1.0)
    assert found["saturation"] == pytest.approx(1, abs=0.1) and found["smoothness"] > 0.85
    assert found["ground"] == pytest.approx(0.9, abs=0.15)


@pytest.mark.slow
def test_the_codecs_reconstructions_are_read_nearly_as_well(clips: Clips) -> None:
    scenes, drawn = clips
    pixels = torch.from_numpy(drawn)
    codec = LinearCodec.fit(torch.from_numpy(textured.sample_clips(1, 24, SIZE)[1]), 24, 8)
    latents = codec.encode(pixels)
    latents[:, :, 0] -= codec.mark
    shown = codec.decode_blocks(latents)[:, 3:].clamp(-1, 1)
    found = means(scenes, ((shown + 1) * 127.5).round().byte().numpy())
    assert np.mean([found[name] for name in ATTRIBUTES]) > 0.95
    assert min(found[name] for name in ATTRIBUTES) >= 0.8


def test_reversed_time_loses_both_directions_alone(clips: Clips) -> None:
    found = means(clips[0][:6], clips[1][:6, 8::-1])
    assert found["direction"] <= 0.2 and found["small_direction"] <= 0.2
    assert found["colour"] == found["small_colour"] == found["small_shape"] == 1


@pytest.mark.slow
def test_swapped_channels_lose_both_colours_alone(clips: Clips) -> None:
    found = means(clips[0][:6], np.ascontiguousarray(clips[1][:6][..., [1, 2, 0]]))
    lost = {name for name in ATTRIBUTES if found[name] == 0}
    assert lost == {"colour", "small_colour"} and found["direction"] == 1


def test_a_still_clip_has_neither_direction_nor_speed_nor_change(clips: Clips) -> None:
    frame = clips[1][0][:1]
    still = read_clip(np.repeat(frame, 81, 0), SIZE)
    assert (still.direction, still.speed, still.small_direction, still.change) == (None, None, None, "steady")
    assert read_clip(frame, SIZE).change is None


def test_a_clip_without_colour_shows_nothing(clips: Clips) -> None:
    scenes, drawn = clips
    for clip in (np.repeat(drawn[0].mean(-1, keepdims=True).astype(np.uint8), 3, -1), drawn[0][:0]):
        assert set(asdict(score(read_clip(clip, SIZE), scenes[0], SIZE)).values()) == {0.0}


@pytest.mark.slow
def test_less_colour_and_less_ground_are_measured(clips: Clips) -> None:
    scenes, drawn = clips[0][:4], clips[1][:4]
    pale = (drawn.astype(np.float32) / 2 + 64).astype(np.uint8)
    before, after = means(scenes, drawn), means(scenes, pale)
    assert after["saturation"] == pytest.approx(before["saturation"] / 2, abs=0.05)
    assert after["ground"] == pytest.approx(before["ground"] / 2, abs=0.05)


def test_a_later_window_of_a_stream_is_read_by_itself(clips: Clips) -> None:
    scene = clips[0][0]
    stream = textured.render(scene, 9, WorldConfig(size_px=48, edge="bounce", pixel_frames=162))
    second = read_clip(stream[81:], SIZE, 81)
    assert [getattr(score(second, scene, SIZE), name) for name in ATTRIBUTES] == [1.0] * len(ATTRIBUTES)


def test_pixels_of_another_size_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels = uint8 .*must be uint8 \(frames, 48, 48, 3\)"):
        read_clip(np.zeros((5, 32, 32, 3), np.uint8), SIZE)


def test_an_object_is_found_where_a_search_over_all_offsets_finds_it() -> None:
    """Of each shape, the least departure of any template at any offset, as Fourier transforms find it."""
    side, sizes = 16, np.asarray([0.8, 1.0], np.float32)
    config = WorldConfig(size_px=side, edge="bounce", pixel_frames=2)
    centres = np.asarray([[5.0, 9.0], [11.0, 6.0]], np.float32)
    share = textured.cover("square", "plain", centres, np.ones(2, np.float32), config)[0]
    weight = np.random.default_rng(0).uniform(0.5, 1.0, share.shape).astype(np.float32)
    found = textured_oracle._find(share, weight, sizes, config)
    mask = np.clip(share / np.maximum(textured_oracle.DARKEST * found.chroma, 0.01)[:, None, None], 0, 1)
    middle = np.full((2, 2), side / 2, np.float32)
    for place, shape in enumerate(SHAPES):
        templates = textured_oracle._as_mask(textured.cover(shape, "plain", middle, sizes, config)[0])
        moved = np.stack([np.roll(templates, (row, column), (1, 2)) for row in range(side) for column in range(side)])
        departures = (weight[:, None, None] * (mask[:, None, None] - moved[None]) ** 2).sum((-1, -2)).min(1)
        wanted = (departures / (100 * (sizes * config.scale) ** 2)).min(1)
        assert found.shape_error[:, place] == pytest.approx(wanted, abs=1e-4)
    assert np.abs(found.centre_px - centres).max() < 0.5
