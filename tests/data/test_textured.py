"""Laws of the textured world: captions, held-out scenes, determinism, motion, change and ground."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from diagonal.config import Config
from diagonal.data import textured
from diagonal.data.embedded import embedded_world
from diagonal.data.textured import TexturedScene
from diagonal.data.world import WorldConfig

SIZE = WorldConfig(size_px=48, edge="bounce")
SCENE = TexturedScene("red", "circle", "left", "quickly", "striped", "pulsing", "blue", "square", "up")


def test_a_caption_parses_back_into_its_scene() -> None:
    assert SCENE.caption == "a pulsing striped red circle moving left quickly and a small blue square moving up"
    for scene in textured.draw_scenes(0, 50):
        assert TexturedScene.parse(scene.caption) == scene


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a pulsing striped red circle", "caption = .*must read 'a CHANGE TEXTURE"),
        (SCENE.caption.replace("striped", "dotted"), "texture = 'dotted': must be one of plain"),
        (SCENE.caption.replace("blue", "red"), "small_colour = 'red': must be another one than colour"),
    ],
)
def test_an_unknown_caption_is_refused_with_what_is_allowed(caption: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TexturedScene.parse(caption)


def test_held_out_and_training_scenes_share_nothing_and_are_all_there_is() -> None:
    held_out, training = textured.scene_numbers(True), textured.scene_numbers(False)
    assert not set(held_out) & set(training)
    assert len(held_out) + len(training) == 6 * 5 * 3 * 3 * 4 * 4 * 2 * 3 * 3
    assert 1 / 25 < len(held_out) / len(training) < 1 / 15


def test_every_value_is_held_out_about_as_often_as_the_others() -> None:
    scenes = [textured.scene_of(number) for number in textured.scene_numbers(True)]
    for name, values in textured.ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(values)
        assert max(counts.values()) < 1.1 * min(counts.values()), name


def test_a_clip_is_a_function_of_its_seed() -> None:
    short = replace(SIZE, pixel_frames=5)
    clip = textured.render(SCENE, 3, short)
    assert clip.dtype == np.uint8 and clip.shape == (5, 48, 48, 3)
    assert np.array_equal(clip, textured.render(SCENE, 3, short))
    assert not np.array_equal(clip, textured.render(SCENE, 4, short))
    captions, clips = textured.sample_clips(7, 3, short)
    again, fewer = textured.sample_clips(7, 2, short)
    assert captions[:2] == again and np.array_equal(clips[:2], fewer)


@pytest.mark.parametrize("size_px", [48, 64])
def test_objects_stay_inside_and_leave_in_their_captions_direction(size_px: int) -> None:
    config = WorldConfig(size_px=size_px, edge="bounce", pixel_frames=161)
    for direction, heading in textured.DIRECTIONS.items():
        path = textured.track("triangle", direction, 0.7, 1.0, np.array([4.0, -4.0]), config)
        reach = 11 * config.scale
        assert path.min() >= reach - 1e-3 and path.max() <= size_px - reach + 1e-3
        along = np.diff(path @ np.array(heading))
        assert along[0] == pytest.approx(0.7 * config.scale, abs=1e-3) and along.min() < 0


def test_what_pulses_changes_its_size_and_what_glows_its_colour() -> None:
    size, glow = textured.changes("pulsing", SIZE)
    assert (size.max(), size.min()) == pytest.approx((1.25, 0.75)) and not glow.any()
    size, glow = textured.changes("glowing", SIZE)
    assert np.ptp(size) == 0 and (glow.min(), glow.max()) == pytest.approx((0, 0.5))
    size, glow = textured.changes("steady", SIZE)
    assert np.ptp(size) == 0 and not glow.any()


def test_new_ground_comes_in_at_the_right_and_the_old_drifts_to_the_left() -> None:
    config = replace(SIZE, pixel_frames=21)
    step = textured.GROUND_SPEED_PX * config.scale * 20
    ground = textured.draw_ground(np.random.default_rng(0), config)
    assert step == pytest.approx(9)
    np.testing.assert_allclose(ground[20][:, :-9], ground[0][:, 9:], atol=1e-4)
    assert np.abs(ground[20][:, -9:] - ground[0][:, -9:]).max() > 0.05


def test_the_preset_draws_from_this_world_and_its_text_has_room_for_every_caption() -> None:
    config = Config.from_preset("tiny-textured")
    world = embedded_world(config)
    captions, clips = world.sample(0, 2)
    assert clips.shape == (2, 81, 48, 48, 3) and config.model.text_tokens == len(captions[0].split()) + 1
    assert world.words >= {word for caption in captions for word in caption.split()}
    assert len(list(world.captions(True))) == len(textured.scene_numbers(True))
