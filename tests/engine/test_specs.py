"""The timeline of a session's text: moved evenly, frozen where it is interrupted, the same bits again elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diagonal.engine.specs import MAX_BLENDS, Blend, Timeline
from tests.networks import draw

PROMPTS = {name: draw(1, 6, 16, seed=number) for number, name in enumerate(["a", "b", "c", "d"])}


def text_of(timeline: Timeline) -> Tensor:
    return timeline.text(PROMPTS.__getitem__)


def test_a_transition_moves_the_text_evenly_and_lands_exactly_on_its_target() -> None:
    start, target = PROMPTS["a"], PROMPTS["b"]
    timeline = Timeline.of("a").change("b", 4)
    assert torch.equal(text_of(timeline), start) and timeline.in_transition
    for done in range(1, 5):
        timeline = timeline.advance()
        torch.testing.assert_close(text_of(timeline), start + done / 4 * (target - start), rtol=0, atol=1e-6)
    assert torch.equal(text_of(timeline), target) and timeline == Timeline.of("b")
    assert timeline.advance() == timeline


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_hard_switch_is_there_after_one_chunk(chunks: int) -> None:
    assert Timeline.of("a").change("b", chunks).advance() == Timeline.of("b")


def test_an_interrupted_transition_goes_on_from_where_it_was() -> None:
    timeline = Timeline.of("a").change("b", 4).advance()
    before = text_of(timeline)
    timeline = timeline.change("c", 2)
    assert torch.equal(text_of(timeline), before), "changing one's mind moves nothing yet"
    timeline = timeline.advance()
    assert torch.equal(text_of(timeline), torch.lerp(torch.lerp(PROMPTS["a"], PROMPTS["b"], 0.25), PROMPTS["c"], 0.5))
    assert timeline.prompts == ("a", "b", "c") and timeline.advance() == Timeline.of("c")


def test_a_change_that_never_moved_leaves_no_trace() -> None:
    assert Timeline.of("a").change("b", 4).change("c", 1) == Timeline.of("a").change("c", 1)


def test_a_text_of_endless_interruptions_stays_bounded_and_close() -> None:
    names = ["a", "b", "c", "d"]
    bounded = whole = Timeline.of("a")
    for number in range(3 * MAX_BLENDS):
        bounded = bounded.change(names[number % 4], 8).advance()
        target = names[number % 4]
        frozen = (*whole.blends, Blend(str(whole.target), whole.done / whole.total)) if whole.done else whole.blends
        whole = Timeline(frozen, target, 1, 8)
        assert len(bounded.blends) <= MAX_BLENDS
    torch.testing.assert_close(text_of(bounded), text_of(whole), rtol=0, atol=0.1)
    assert len(whole.blends) == 3 * MAX_BLENDS and float(PROMPTS["a"].std()) > 0.9


@pytest.mark.parametrize("chunks", [2, 8, 64])
def test_what_is_dropped_of_a_text_is_never_seen_as_a_jump(chunks: int) -> None:
    timeline, names = Timeline.of("a"), ["b", "c", "d", "a"]
    for number in range(2 * MAX_BLENDS):
        before = text_of(timeline)
        timeline = timeline.change(names[number % 4], chunks)
        assert float((text_of(timeline) - before).abs().max()) < 0.2
        timeline = timeline.advance()
