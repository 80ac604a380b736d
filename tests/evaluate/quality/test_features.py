"""The feature distance is 0 for equal sets, known for shifted ones, and sees what the eye sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.data.world import all_scenes, render, world_of
from diagonal.errors import FieldError
from diagonal.evaluate.quality.features import FEATURES, clip_features, frechet

WORLD = world_of(Config.from_preset("tiny"))


def clips(seed: int, count: int = 12) -> Tensor:
    return torch.stack([torch.from_numpy(render(all_scenes()[11 * i], [seed, i], WORLD)) for i in range(count)])


def test_the_distance_of_normal_sets_is_what_the_formula_says() -> None:
    draw = np.random.default_rng(0)
    points = draw.normal(0, 1, (4000, 3))
    assert frechet(points, points) == pytest.approx(0.0, abs=1e-9)
    assert frechet(points, points + [3.0, 0.0, 4.0]) == pytest.approx(25.0)
    assert frechet(points, 2 * points) == pytest.approx(3.0, rel=0.1)  # tr (2 - 1)^2 I, of 3 dimensions


def test_stills_and_grey_clips_are_further_away_than_other_draws_of_the_same_scenes() -> None:
    own, other = (clip_features(clips(seed)).numpy().astype(np.float64) for seed in (1, 2))
    assert own.shape == (12, FEATURES)
    near = frechet(own, other)
    still = clips(1)[:, :1].expand(-1, 81, -1, -1, -1)
    grey = clips(1).float().mean(-1, keepdim=True).to(torch.uint8).expand(-1, -1, -1, -1, 3)
    for worse in (still, grey):
        assert frechet(own, clip_features(worse).numpy().astype(np.float64)) > 2 * near


def test_features_are_the_same_in_every_batch_and_one_frame_is_refused() -> None:
    some = clips(1, 3)
    torch.testing.assert_close(clip_features(some)[1:2], clip_features(some[1:2]))
    with pytest.raises(FieldError, match="clips"):
        clip_features(some[:, :1])
