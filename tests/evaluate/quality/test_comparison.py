"""A panel shows every source the same captions and noise, keeps each batch by its hash, and holds one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.evaluate.quality import comparison
from diagonal.evaluate.quality.comparison import Source, chunk_motion, run_panel
from diagonal.evaluate.quality.sources import Make, clip_seeds, draw_captions, own_world
from diagonal.evaluate.quality.worlds import world_for
from diagonal.storage import Folder

CONFIG = Config.from_preset("tiny")


class Drawn:
    """A source that draws the world's own clips, a little brighter; remembers what it was asked for."""

    def __init__(self, more: int) -> None:
        self.more, self.asked = more, list[int]()

    def load(self) -> Make:
        return self

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.asked += seeds
        clips = [torch.from_numpy(own_world(CONFIG).render(c, s)) for c, s in zip(captions, seeds, strict=True)]
        return (torch.stack(clips).int() + self.more).clamp(0, 255).to(torch.uint8)


@pytest.mark.slow
def test_batches_are_kept_on_s3_too_and_made_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "CLIPS_PER_BATCH", 3)
    world, parts = own_world(CONFIG), Folder(f"s3://{bucket}/parts")
    captions, seeds = draw_captions(5, 1, world.captions()), clip_seeds(5, 1)
    first, second = Drawn(0), Drawn(4)

    def run(name: str = "second") -> dict[str, comparison.Clips]:
        sources = [Source("first", "1", 0, first.load), Source(name, name, 0, second.load)]
        return run_panel(sources, captions, seeds, parts, world=world, reference="first", say=lambda line: None)

    found = run()
    assert first.asked == second.asked == seeds
    assert found["first"].values["colour"] == [1.0] * 5 and "psnr_db" not in found["first"].values
    assert found["second"].values["psnr_db"] == pytest.approx([36.1] * 5, abs=0.5)  # 20 log10(255 / 4)
    assert found["second"].count == 5 and found["second"].pixel_frames == 5 * 81
    assert run()["second"] == found["second"] and second.asked == seeds
    run("third")
    assert second.asked == seeds * 2


def test_captions_come_each_once_before_any_comes_again_and_none_is_refused() -> None:
    known = own_world(CONFIG).captions()
    order = draw_captions(2 * len(known), 7, known)
    assert sorted(order[: len(known)]) == sorted(order[len(known) :]) == sorted(known)
    for clips, some, name in ((0, known, "clips"), (1, [], "prompts")):
        with pytest.raises(FieldError, match=name):
            draw_captions(clips, 1, some)


def test_a_world_is_read_by_names_and_a_model_of_real_video_has_none() -> None:
    world = own_world(CONFIG)
    caption = world.captions(held_out=True)[0]
    assert caption in world.captions() and len(world.captions(held_out=True)) == 14
    clip = world.render(caption, 3)
    scores = world.score(clip, caption)
    assert {*world.scores, *world.shown} == set(scores) and set(world.rates) <= set(world.scores)
    other = world.changed(caption, 4)
    assert all(world.score(clip, other)[name] == 0.0 for name in world.rates)
    with pytest.raises(FieldError, match="prompt = 'a cat'"):
        world.check("a cat")
    assert world_for(Config.from_preset("wan-1.3b")) is None
    with pytest.raises(FieldError, match="preset = 'wan-1.3b'"):
        own_world(Config.from_preset("wan-1.3b"))


def test_motion_at_the_borders_of_chunks_is_told_from_motion_inside_them() -> None:
    """A picture that brightens by one level a frame, and by three where a chunk begins."""
    geometry = Config.from_preset("tiny-textured").geometry
    steps = np.ones(geometry.clip_pixel_frames - 1)
    clean = np.concatenate(([0.0], np.cumsum(steps)))
    steps[[geometry.pixel_start(chunk) - 1 for chunk in range(1, 7)]] = 3.0
    seamed = np.concatenate(([0.0], np.cumsum(steps)))
    for levels, seam in ((clean, 1.0), (seamed, 3.0)):
        pixels = np.broadcast_to(levels[:, None, None, None], (len(levels), 8, 8, 3)).astype(np.uint8)
        found = chunk_motion(pixels, geometry)
        assert found == pytest.approx({"seam": seam, "motion_inside": 1 / 255}, rel=1e-4)
