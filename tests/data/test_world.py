"""Laws of the moving-shapes world: captions, held-out scenes, determinism, motion at the edges."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from diagonal.data import world
from diagonal.data.world import Scene, WorldConfig

HELD_OUT = [
    "a red circle moving left slowly",
    "a green square moving right quickly",
    "a blue triangle moving up slowly",
    "a yellow circle moving down quickly",
    "a cyan square moving right slowly",
    "a magenta triangle moving up quickly",
    "a red square moving down quickly",
    "a green triangle moving left slowly",
    "a blue circle moving up quickly",
    "a yellow square moving down slowly",
    "a cyan triangle moving left quickly",
    "a magenta circle moving right slowly",
    "a red triangle moving down slowly",
    "a green circle moving left quickly",
]
SCENE = Scene("red", "circle", "right", "quickly")


def test_every_caption_parses_back_into_its_scene() -> None:
    scenes = world.all_scenes()
    assert len(set(scenes)) == 6 * 3 * 4 * 2
    assert [Scene.parse(scene.caption) for scene in scenes] == list(scenes)
    assert SCENE.caption == "a red circle moving right quickly"


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a pink circle moving right slowly", "colour = 'pink'.*red, green, blue, yellow, cyan, magenta"),
        ("a red star moving right slowly", "shape = 'star'.*circle, square, triangle"),
        ("a red circle moving north slowly", "direction = 'north'.*left, right, up, down"),
        ("a red circle moving right fast", "speed = 'fast'.*slowly, quickly"),
        ("a red circle", "caption = 'a red circle'.*COLOUR SHAPE"),
    ],
)
def test_an_unknown_caption_is_refused_with_what_is_allowed(caption: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Scene.parse(caption)


@pytest.mark.parametrize(("field", "value"), [("size_px", 8), ("pixel_frames", 0), ("fps", 2.5), ("edge", "stop")])
def test_a_config_out_of_range_names_its_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value!r}: must be"):
        WorldConfig(**{field: value})  # type: ignore[arg-type]


def test_the_held_out_scenes_are_this_list_and_no_training_scene() -> None:
    assert [scene.caption for scene in world.held_out_scenes()] == HELD_OUT
    assert set(world.training_scenes()) | set(world.held_out_scenes()) == set(world.all_scenes())
    assert len(world.training_scenes()) == 144 - len(HELD_OUT)


@pytest.mark.parametrize("attribute", list(world.ATTRIBUTES))
def test_every_attribute_is_held_out_evenly(attribute: str) -> None:
    counts = Counter(getattr(scene, attribute) for scene in world.held_out_scenes())
    assert set(counts) == set(world.ATTRIBUTES[attribute])
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("edge", world.EDGES)
def test_a_clip_is_a_function_of_its_seed(edge: str) -> None:
    config = WorldConfig(edge=edge, pixel_frames=9)
    clip = world.render(SCENE, 3, config)
    assert clip.dtype == np.uint8 and clip.shape == (9, 32, 32, 3)
    assert np.array_equal(clip, world.render(SCENE, 3, config))
    assert not np.array_equal(clip, world.render(SCENE, 4, config))


def test_a_longer_clip_begins_with_the_shorter_one() -> None:
    short, long = (world.render(SCENE, 0, WorldConfig(pixel_frames=frames)) for frames in (1, 249))
    assert np.array_equal(short, long[:1])


def test_on_the_torus_the_shape_returns_after_one_lap() -> None:
    clip = world.render(SCENE, 0, WorldConfig())
    np.testing.assert_allclose(clip[32].astype(int), clip[0], atol=1)
    assert np.abs(clip[16].astype(int) - clip[0]).max() > 50


@pytest.mark.parametrize("scene", world.all_scenes()[::5], ids=lambda scene: scene.caption)
def test_in_the_box_the_shape_stays_inside_and_leaves_in_its_captions_direction(scene: Scene) -> None:
    config = WorldConfig(edge="bounce")
    for start in ((-5.0, 5.0), (5.0, -5.0), (0.0, 0.0)):
        path = world.track(scene, np.array(start), config)
        reach = world.reach_px(scene.shape)
        assert path.min() >= reach - 1e-4 and path.max() <= config.size_px - reach + 1e-4
        along = np.diff(path @ np.array(world.DIRECTIONS[scene.direction]))
        legs = np.flatnonzero(along < 0)
        assert along[0] == pytest.approx(config.speed_px(scene.speed), abs=1e-4)
        assert len(legs) and along[: legs[0]].sum() >= 32 / 2 - reach - config.speed_px(scene.speed)


def test_sizes_scale_with_the_frame_and_speeds_with_the_rate() -> None:
    large = WorldConfig(size_px=64, fps=32)
    assert large.speed_px("quickly") == WorldConfig().speed_px("quickly")
    small = world.cover("square", np.full((1, 2), 16, np.float32), WorldConfig()).sum()
    assert world.cover("square", np.full((1, 2), 32, np.float32), large).sum() == pytest.approx(4 * small, rel=0.02)


def test_backgrounds_are_plain_or_graded() -> None:
    spreads = []
    for seed in range(40):
        corner = world.render(Scene("red", "circle", "left", "slowly"), seed, WorldConfig(pixel_frames=1))[0]
        rim = np.concatenate([corner[:2].reshape(-1, 3), corner[-2:].reshape(-1, 3)])
        assert np.ptp(rim, axis=1).max() == 0, "a background is grey"
        spreads.append(int(np.ptp(rim[:, 0].astype(int))))
    assert 10 <= sum(spread == 0 for spread in spreads) <= 30


def test_clips_show_every_scene_once_before_any_twice_and_each_by_its_own_seed() -> None:
    config = WorldConfig(pixel_frames=2)
    captions, clips = world.sample_clips(7, 140, config)
    assert sorted(captions[:130]) == sorted(scene.caption for scene in world.training_scenes())
    assert clips.shape == (140, 2, 32, 32, 3) and clips.dtype == np.uint8
    fewer_captions, fewer = world.sample_clips(7, 3, config)
    assert fewer_captions == captions[:3] and np.array_equal(fewer, clips[:3])
    assert world.sample_clips(8, 3, config)[0] != captions[:3]
    assert world.sample_clips(7, 0, config)[1].shape == (0, 2, 32, 32, 3)
    again = world.sample_clips(7, 2, config, [SCENE])[1]
    assert not np.array_equal(again[0], again[1]), "a scene shown twice is drawn anew"
    with pytest.raises(ValueError, match="scenes = "):
        world.sample_clips(7, 1, config, [])
