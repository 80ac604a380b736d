"""What a world's oracle tells evaluation of whole clips and of pieces."""

from __future__ import annotations

import pytest

from diagonal.config import Config
from diagonal.evaluate.quality.sources import draw_captions, own_world


@pytest.mark.slow
def test_a_piece_too_short_for_a_slow_change_is_judged_by_the_rest() -> None:
    world = own_world(Config.from_preset("tiny-textured"))
    caption = next(one for one in draw_captions(50, 0, world.captions()) if "steady" in one)
    clip = world.render(caption, 1)
    whole, piece = world.score(clip, caption), world.score(clip[:48], caption)
    assert set(world.scores) | set(world.shown) == set(whole) == {*piece, "change"} != set(piece)
    assert world.score(clip[:49], caption)["change"] == 1.0
    assert all(whole[name] == piece[name] == 1.0 for name in world.rates if name != "change")
    assert world.score(0 * clip, caption)["change"] == 0.0, "long enough, and nothing is there"
