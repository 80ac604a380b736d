"""Promotion: a judgement is written into the manifest of a whole release, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diagonal.model.base_model import embedded
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release
from jobs.promote import work


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release as `jobs/export.py` leaves it: whole, and judged by nobody."""
    folder = Path(shutil.copytree(embedded("release"), tmp_path / "release"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["promoted"], manifest["promotion_reasons"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_release_is_promoted_and_refused_with_reasons(folder: Path) -> None:
    before = dict(Release.load(folder).manifest)
    assert "promoted" not in before
    work([str(folder), "--reason", "scores above those of r1", "--reason", "seen by Ann"])
    promoted = Release.load(folder)
    reasons = ["scores above those of r1", "seen by Ann"]
    assert promoted.manifest == {**before, "promoted": True, "promotion_reasons": reasons}
    work([str(folder), "--refuse", "--reason", "colours fade"])
    with pytest.raises(ReleaseError, match="colours fade"):
        Release.load(folder).check_promoted()


def test_a_release_that_is_not_whole_is_not_promoted(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(ReleaseError, match="config.json"):
        work([str(folder), "--reason", "r"])
    assert "promoted" not in json.loads((folder / "manifest.json").read_text())
    with pytest.raises(SystemExit):
        work([str(folder)])
