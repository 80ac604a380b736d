"""Streams go chunk by chunk through the serving path's functions; slopes and turns are read from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diagonal.errors import FieldError
from diagonal.evaluate.quality import streams
from diagonal.evaluate.quality.report import drift_report, turns_report
from diagonal.evaluate.quality.sources import Student, draw_captions, own_world
from diagonal.evaluate.quality.streams import chunks_for, clip_part, drift_part, kept_batches, stream, turn_part
from diagonal.model.release import Release
from diagonal.storage import Folder


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.of(Release.load())


@pytest.mark.slow
def test_a_stream_is_the_clip_chunk_by_chunk(student: Student) -> None:
    caption, seed = "a red circle moving left quickly", 5
    parts = list(stream(student, [caption], [seed], student.config.geometry.clip_chunks))
    assert [part.shape[1] for part in parts] == [9, 12, 12, 12, 12, 12, 12]
    clip = student([caption], [seed])
    assert (torch.cat(parts, dim=1).int() - clip.int()).abs().max() <= 1


def test_the_pieces_of_a_clip_are_its_chunks_and_each_is_read_at_its_own_time(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(student.config)
    captions = draw_captions(3, 0, world.captions())
    clips = torch.from_numpy(np.stack([world.render(caption, seed) for seed, caption in enumerate(captions)]))
    clips[:, 57:] = 0  # the world's own, whose last piece shows nothing
    part = clip_part(lambda *_: clips, student.config.geometry, world, captions, [0, 1, 2])
    assert part["times_s"] == [round(middle / 16, 4) for middle in (16.5, 45.0, 69.0)]
    for name in ("colour", "direction", "speed"):
        assert [row[:2] for row in part["values"][name]] == [[1.0, 1.0]] * 3
    assert [row[2] for row in part["values"]["colour"]] == [0.0] * 3
    monkeypatch.setattr(streams, "figures", lambda piece, _, __, start: {"frames": len(piece), "start": start})
    part = clip_part(lambda *_: clips[:1], student.config.geometry, world, captions[:1], [0])
    assert part["values"] == {"frames": [[33, 24, 24]], "start": [[0, 33, 57]]}


def test_so_many_seconds_take_so_many_chunks(student: Student) -> None:
    assert [chunks_for(student, seconds) for seconds in (9 / 16, 10 / 16, 81 / 16, 180.0)] == [1, 2, 7, 241]
    with pytest.raises(FieldError, match="seconds = 0"):
        chunks_for(student, 0)


@pytest.mark.slow
def test_before_the_first_eviction_a_recache_changes_nothing_but_a_prompt(student: Student) -> None:
    caption, other = "a red circle moving left quickly", "a blue square moving up slowly"
    plain = list(stream(student, [caption], [5], 4))
    again = list(stream(student, [caption], [5], 4, {2: [caption]}, recovered_at=2))
    turned = list(stream(student, [caption], [5], 4, {2: [other]}))
    for chunk in range(4):
        assert (plain[chunk].int() - again[chunk].int()).abs().max() <= 1  # rounding alone
        assert torch.equal(plain[chunk], turned[chunk]) == (chunk < 2)


@pytest.mark.slow
def test_drift_is_told_by_window_with_the_worlds_scores_and_the_pictures_own(student: Student) -> None:
    world, seconds = own_world(student.config), 6.0
    captions = draw_captions(2, 1, world.captions())
    part = drift_part(student, world, captions, [1, 2], seconds)
    assert len(part["times_s"]) == chunks_for(student, seconds) // streams.WINDOW_CHUNKS >= 2
    report = drift_report([part, part], seconds, world)
    assert report["streams"] == 4 and not report["teacher"]
    assert report["curves"]["colour"]["mean"] == [1.0] * len(part["times_s"])
    assert {*world.scores, "picture_sharpness"} - {"change"} <= set(report["change"])
    with pytest.raises(FieldError, match="long enough for a window of 9 chunks"):
        drift_part(student, world, captions[:1], [1], 1.0, window_chunks=9)


def test_drift_is_the_last_quarter_over_the_first_piece_and_over_the_teachers_own() -> None:
    falling = [1.0, 0.9, 0.8, 0.8, 0.8, 0.8, 0.5, 0.7]
    ours = {"times_s": [1.0] * 8, "values": {"colour": [falling] * 3, "own": [[1.0] * 8] * 3}}
    teachers = {"times_s": [1.0] * 3, "values": {"colour": [[1.0, 0.9, 0.8]] * 2}}
    plain, beside = drift_report([ours], 180.0, None), drift_report([ours], 180.0, None, [teachers])
    assert [one["mean"] for one in plain["quarters"]["colour"]] == pytest.approx([0.95, 0.8, 0.8, 0.6])
    assert plain["first"]["colour"]["mean"] == 1.0 and plain["change"]["colour"]["mean"] == pytest.approx(-0.4)
    assert beside["change"]["colour"]["mean"] == pytest.approx(-0.2) and set(beside["change"]) == {"colour"}


@pytest.mark.slow
def test_a_changed_prompt_is_forgotten_and_obeyed(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "TURN_AT", 2)
    world = own_world(student.config)
    found = turns_report([turn_part(student, world, draw_captions(2, 3, world.captions()), [1, 2])])
    assert found["streams"] == 2 and len(found["obeyed"]) == streams.TURN_CHUNKS
    assert found["obeyed"][-1]["mean"] > found["obeyed"][0]["mean"]
    assert found["forgotten"][-1]["mean"] < 0.3 < 0.7 < min(one["mean"] for one in found["unturned"]), found["unturned"]
    assert found["settled"]["mean"] > found["obeyed"][0]["mean"] and found["settled_unturned"]["mean"] > 0.7
    assert found["recache_db"][0]["mean"] > 50.0  # nothing was evicted: rounding alone


def test_a_batch_of_streams_that_is_kept_is_not_made_again(tmp_path: Path) -> None:
    made: list[list[int]] = []

    def make(captions: Any, seeds: Any) -> dict[str, Any]:
        made.append(list(seeds))
        return {"seeds": list(seeds)}

    run = partial(kept_batches, make, ["a"] * 10, list(range(10)), Folder(str(tmp_path)), say=lambda line: None)
    assert run(["x"]) == run(["x"]) == [{"seeds": list(range(8))}, {"seeds": [8, 9]}]
    assert made == [list(range(8)), [8, 9]]
    run(["y"])
    assert len(made) == 4
