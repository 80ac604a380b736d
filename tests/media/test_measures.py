"""Each measure answers to what it is named for, and stays still for the rest."""

from __future__ import annotations

import numpy as np
import pytest

from diagonal.errors import FieldError
from diagonal.media.measures import Pixels, flicker, measure, motion_amplitude, saturation, sharpness


def flat(frames: int, *colour: int) -> Pixels:
    return np.broadcast_to(np.array(colour, np.uint8), (frames, 16, 16, 3)).copy()


def moving_square(step: int) -> Pixels:
    video = flat(6, 0, 0, 0)
    for index, image in enumerate(video):
        image[4:8, 1 + index * step : 5 + index * step] = 255
    return video


def test_a_grey_still_has_no_saturation_sharpness_motion_or_flicker() -> None:
    assert measure(flat(5, 100, 100, 100)) == measure(flat(5, 200, 200, 200))
    assert set(vars(measure(flat(5, 100, 100, 100))).values()) == {0.0}


def test_pure_colour_is_fully_saturated_and_black_is_not() -> None:
    assert saturation(flat(2, 255, 0, 0)) == 1.0
    assert saturation(flat(2, 0, 0, 0)) == 0.0
    assert saturation(flat(2, 200, 100, 100)) == pytest.approx(0.5)


def test_blur_lowers_sharpness() -> None:
    sharp = moving_square(1)
    blurred = (sharp.astype(np.uint16) + np.roll(sharp, 1, axis=2) + np.roll(sharp, 2, axis=2)) // 3
    assert sharpness(blurred.astype(np.uint8)) < 0.8 * sharpness(sharp)


def test_faster_motion_has_the_larger_amplitude() -> None:
    assert 0 < motion_amplitude(moving_square(1)) < motion_amplitude(moving_square(2))
    assert motion_amplitude(moving_square(0)) == 0.0


def test_a_fade_does_not_flicker_and_a_blinking_picture_does() -> None:
    fade = np.concatenate([flat(1, level, level, level) for level in range(0, 60, 10)])
    blink = np.concatenate([flat(1, 100, 100, 100), flat(1, 110, 110, 110)] * 3)
    assert flicker(fade) == pytest.approx(0.0, abs=1e-6)
    assert flicker(blink) == pytest.approx(2 * 10 / 255, rel=1e-4)


def test_one_frame_has_neither_motion_nor_flicker() -> None:
    assert motion_amplitude(flat(1, 9, 8, 7)) == flicker(flat(2, 9, 8, 7)) == 0.0


@pytest.mark.parametrize("video", [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 1), np.uint8)])
def test_pixels_of_another_shape_are_refused(video: Pixels) -> None:
    with pytest.raises(FieldError, match="pixels.shape"):
        measure(video)
    with pytest.raises(FieldError, match="pixels.dtype"):
        saturation(np.zeros((1, 4, 4, 3), np.float32))
