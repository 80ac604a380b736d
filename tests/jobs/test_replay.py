"""The replay job: from the log that an owner was given, the video again."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from diagonal.engine.engine import Engine
from diagonal.engine.snapshot import SnapshotError
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.errors import FieldError
from diagonal.media.encode import ChunkEncoder, write_fragments
from diagonal.model.release import Release
from jobs.replay import work


@pytest.mark.slow
def test_a_recorded_session_is_the_same_video_again(tmp_path: Path) -> None:
    release = Release.load(None)
    engine, geometry = Engine(release), release.config.geometry
    spec = SessionSpec("s", "a red circle moving right quickly", 3, 30, record=True)
    engine.open(spec)
    encoder = ChunkEncoder(geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps)
    parts = [encoder.init_segment()]
    for chunk in range(3):
        if chunk == 1:
            engine.interact("s", PromptChange("e", "a blue square moving up slowly"))
        engine.request("s")
        (result,) = engine.step()
        parts.append(encoder.encode_chunk(result.pixels.numpy()))
    (tmp_path / "s.json").write_text(engine.recording("s").to_json())
    write_fragments(tmp_path / "first.mp4", parts)
    work([str(tmp_path / "s.json"), "--out", str(tmp_path / "again.mp4")])
    first, again = (pixels(tmp_path / name) for name in ("first.mp4", "again.mp4"))
    assert first.shape[0] == 30
    assert np.array_equal(first, again)


def test_what_is_no_recording_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="recording"):
        work([str(tmp_path / "none.json"), "--out", str(tmp_path / "x.mp4")])
    (tmp_path / "other.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(SnapshotError, match="schema"):
        work([str(tmp_path / "other.json"), "--out", str(tmp_path / "x.mp4")])
    assert not (tmp_path / "x.mp4").exists()


def pixels(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
