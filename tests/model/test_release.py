"""The Release: whole, of this format and unchanged to the byte, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diagonal.errors import FieldError
from diagonal.model import weights
from diagonal.model.weights import Release, ReleaseError, load_causal, load_text, write_release
from tests.model.folders import TRANSFORMER, edit_json, files_of
from tests.networks import small_config


def test_a_release_holds_what_it_was_made_from(release: Release, base: Path) -> None:
    loaded = Release.load(release.folder)
    assert (loaded.name, loaded.config) == ("r1", small_config())
    assert loaded.manifest["scores"] == {"colour": 0.5} and loaded.manifest["lineage"] == {"parent": "base"}
    generator = loaded.generator()
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    expected = load_causal(base, small_config()).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in generator.state_dict().items())
    assert torch.equal(loaded.text().encode(["a"]), load_text(base, small_config()).encode(["a"]))
    assert set(loaded.manifest["files"]) == set(files_of(release.folder)) - {"manifest.json"}


@pytest.mark.parametrize("name", [TRANSFORMER, "vae/config.json", "config.json", "tokenizer/tokenizer.json"])
def test_one_changed_byte_in_any_file_is_refused_by_its_name(name: str, release: Release) -> None:
    path = release.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReleaseError, match=f"{name} is missing or differs"):
        Release.load(release.folder)


def test_a_half_written_release_is_refused(release: Release) -> None:
    manifest = (release.folder / "manifest.json").read_text()
    (release.folder / TRANSFORMER).unlink()
    with pytest.raises(ReleaseError, match=f"{TRANSFORMER} is missing"):
        Release.load(release.folder)
    for text in ("", manifest[: len(manifest) // 2]):
        (release.folder / "manifest.json").write_text(text)
        with pytest.raises(ReleaseError, match="manifest.json.*allowed is JSON"):
            Release.load(release.folder)
    (release.folder / "manifest.json").unlink()
    with pytest.raises(ReleaseError, match="manifest.json.*exists; jobs/export.py writes one"):
        Release.load(release.folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused_with_the_allowed_one(version: object, release: Release) -> None:
    edit_json(release.folder / "manifest.json", format_version=version)
    with pytest.raises(ReleaseError, match=f"format_version = {version!r}, allowed is 1"):
        Release.load(release.folder)


def test_a_manifest_without_its_files_is_refused(release: Release) -> None:
    manifest = json.loads((release.folder / "manifest.json").read_text())
    del manifest["files"]
    (release.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match=r"has no \['files'\]"):
        Release.load(release.folder)
    (release.folder / "manifest.json").write_text("[]")
    with pytest.raises(ReleaseError, match="format_version = None"):
        Release.load(release.folder)


def test_a_release_is_written_whole_or_not_at_all(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr(weights, "file_hash", fail)
    with pytest.raises(OSError, match="full"):
        write_release(tmp_path / "new", name="r", student=base, base=base, lineage={}, scores={})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_release_is_never_written_over_another(release: Release, base: Path) -> None:
    before = files_of(release.folder)
    with pytest.raises(FieldError, match="release folder = .*does not exist yet"):
        write_release(release.folder, name="r2", student=base, base=base, lineage={}, scores={})
    assert files_of(release.folder) == before
