"""Laws of the oracle: it reads the world's own clips without error, and a corruption moves the score that it hurts."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from diagonal.data import world
from diagonal.data.oracle import Scores, read_clip, score
from diagonal.data.world import Pixels, Scene, WorldConfig

ATTRIBUTES = tuple(world.ATTRIBUTES)
CONFIG = WorldConfig()
SCENES = world.all_scenes()[3::13]  # every value of every attribute


def means(clips: list[Pixels], scenes: list[Scene], config: WorldConfig = CONFIG) -> dict[str, float]:
    scores = [score(read_clip(clip, config), scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {field.name: float(np.mean([getattr(one, field.name) for one in scores])) for field in fields(Scores)}


@pytest.fixture(scope="module")
def clips() -> list[Pixels]:
    return [world.render(scene, seed, CONFIG) for seed, scene in enumerate(SCENES)]


@pytest.mark.slow
@pytest.mark.parametrize("edge", world.EDGES)
def test_the_worlds_own_clips_are_read_without_error(edge: str) -> None:
    config = WorldConfig(edge=edge)
    captions, clips = world.sample_clips(5, 144, config, world.all_scenes())
    found = means(list(clips), [Scene.parse(caption) for caption in captions], config)
    assert [found[name] for name in ATTRIBUTES] == [1, 1, 1, 1]
    assert found["smoothness"] > 0.93 and found["saturation"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("config", [WorldConfig(size_px=64), WorldConfig(size_px=48, fps=24, edge="bounce")])
def test_other_sizes_and_rates_are_read_as_well(config: WorldConfig) -> None:
    found = means([world.render(scene, 1, config) for scene in SCENES], list(SCENES), config)
    assert [found[name] for name in ATTRIBUTES] == [1, 1, 1, 1]


@pytest.mark.parametrize("edge", world.EDGES)
def test_little_noise_changes_little(edge: str) -> None:
    config, generator = WorldConfig(edge=edge), np.random.default_rng(0)
    noisy = [
        np.clip(world.render(scene, 2, config) + generator.normal(0, 25.5, (81, 32, 32, 3)), 0, 255).astype(np.uint8)
        for scene in SCENES
    ]
    found = means(noisy, list(SCENES), config)
    assert [found[name] for name in ATTRIBUTES] == [1, 1, 1, 1]
    assert found["smoothness"] > 0.75 and found["saturation"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("edge", world.EDGES)
def test_one_wrong_frame_flips_nothing(edge: str) -> None:
    config = WorldConfig(edge=edge)
    for scene in SCENES:
        clip = world.render(scene, 0, config)
        clip[40] = np.roll(clip[40], (16, 16), (0, 1))
        clip[60] = 128
        assert score(read_clip(clip, config), scene).direction == 1
        assert score(read_clip(clip, config), scene).speed == 1


def fallen(clips: list[Pixels]) -> set[str]:
    """The attributes that fell to zero; the others are whole."""
    found = means(clips, list(SCENES))
    assert {found[name] for name in ATTRIBUTES} <= {0.0, 1.0}
    return {name for name in ATTRIBUTES if found[name] == 0}


def test_reversed_time_loses_the_direction_alone(clips: list[Pixels]) -> None:
    assert fallen([clip[::-1] for clip in clips]) == {"direction"}


def test_a_reversed_first_leg_loses_the_direction_in_the_box() -> None:
    config = WorldConfig(edge="bounce", pixel_frames=9)
    backwards = [world.render(scene, 0, config)[::-1] for scene in SCENES]
    assert means(backwards, list(SCENES), config)["direction"] == 0


def test_swapped_channels_lose_the_colour_alone(clips: list[Pixels]) -> None:
    assert fallen([clip[..., [1, 2, 0]] for clip in clips]) == {"colour"}


def test_another_shape_loses_the_shape_alone() -> None:
    others = dict(zip(world.SHAPES, np.roll(world.SHAPES, 1), strict=True))
    swapped = [Scene(one.colour, str(others[one.shape]), one.direction, one.speed) for one in SCENES]
    assert fallen([world.render(scene, 0, CONFIG) for scene in swapped]) == {"shape"}


def test_repeated_frames_lose_the_quick_speed_and_skipped_ones_the_slow(clips: list[Pixels]) -> None:
    for clip, scene in zip(clips, SCENES, strict=True):
        altered = np.repeat(clip, 2, axis=0)[:81] if scene.speed == "quickly" else clip[::2]
        found = score(read_clip(altered, CONFIG), scene)
        assert (found.colour, found.shape, found.direction, found.speed) == (1, 1, 1, 0)


@pytest.mark.parametrize("edge", world.EDGES)
def test_shuffled_frames_lose_the_smoothness(edge: str) -> None:
    config, order = WorldConfig(edge=edge), np.random.default_rng(0).permutation(81)
    shuffled = means([world.render(scene, 0, config)[order] for scene in SCENES], list(SCENES), config)
    assert shuffled["smoothness"] < 0.4 and shuffled["steadiness"] < 0.6
    assert (shuffled["colour"], shuffled["shape"]) == (1, 1)


def test_stuttering_frames_lose_the_smoothness_and_keep_the_steadiness(clips: list[Pixels]) -> None:
    stuttering = means([clip[np.arange(81) // 4 * 4] for clip in clips], list(SCENES))
    assert stuttering["smoothness"] < 0.7 and stuttering["steadiness"] > 0.95


@pytest.mark.parametrize("share", [0.5, 1.3])
def test_saturation_follows_the_chroma(clips: list[Pixels], share: float) -> None:
    altered = []
    for clip in clips:
        grey = clip.mean(-1, keepdims=True)
        altered.append(np.clip(grey + share * (clip - grey), 0, 255).astype(np.uint8))
    ratio = means(altered, list(SCENES))["saturation"] / means(clips, list(SCENES))["saturation"]
    assert ratio == pytest.approx(share, abs=0.15)


@pytest.mark.parametrize("edge", world.EDGES)
def test_a_clip_without_colour_scores_zero_everywhere(edge: str, clips: list[Pixels]) -> None:
    config = WorldConfig(edge=edge)
    greyed = np.repeat(clips[0].mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    for clip in (greyed, np.zeros((81, 32, 32, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)):
        assert score(read_clip(clip, config), SCENES[0]) == Scores(0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("edge", world.EDGES)
def test_a_still_clip_has_neither_direction_nor_speed(edge: str, clips: list[Pixels]) -> None:
    for frames in (1, 2, 81):
        found = read_clip(np.repeat(clips[0][:1], frames, 0), WorldConfig(edge=edge))
        assert (found.direction, found.speed, found.smoothness) == (None, None, 1.0)
        assert found.colour and found.shape


@pytest.mark.parametrize("edge", world.EDGES)
def test_a_cut_reads_its_own_frames(edge: str) -> None:
    config = WorldConfig(edge=edge)
    scene, later = Scene("red", "square", "left", "slowly"), Scene("blue", "circle", "left", "slowly")
    clip = np.concatenate([world.render(scene, 0, config)[:45], world.render(later, 0, config)[45:]])
    first, last = read_clip(clip, config).cut(0, 45), read_clip(clip, config).cut(45, 81)
    assert (first.colour, first.shape, last.colour, last.shape) == ("red", "square", "blue", "circle")
    assert score(last, later).direction == 1
    assert last.cut(12, 24).frames.first_pixel_frame == 57


def test_pixels_of_another_size_or_type_are_refused(clips: list[Pixels]) -> None:
    with pytest.raises(ValueError, match=r"pixels = uint8 \(81, 16, 32, 3\): must be uint8 \(frames, 32, 32, 3\)"):
        read_clip(clips[0][:, :16], CONFIG)
    with pytest.raises(ValueError, match="pixels = float32"):
        read_clip(clips[0].astype(np.float32), CONFIG)
