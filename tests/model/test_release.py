"""The Release: whole, of this format and unchanged to the byte, or refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from diagonal.errors import FieldError
from diagonal.files import file_hash
from diagonal.model.base_model import load_causal, load_text
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release, write_release
from tests.model.folders import TRANSFORMER, edit_json, files_of, upload
from tests.networks import small_config
from tests.s3 import FaultyProxy


def test_a_release_holds_what_it_was_made_from(release: Release, base: Path) -> None:
    loaded = Release.load(release.folder)
    assert (loaded.name, loaded.config) == ("r1", small_config())
    assert loaded.manifest["scores"] == {"colour": 0.5} and loaded.manifest["lineage"] == {"stage2": {"parent": "base"}}
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


def test_a_release_is_written_whole_or_not_at_all(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr("diagonal.model.release.file_hash", fail)
    with pytest.raises(OSError, match="full"):
        write_release(tmp_path / "new", name="r", student=base, base=base, lineage={}, scores={})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_release_is_never_written_over_another(release: Release, base: Path) -> None:
    before = files_of(release.folder)
    with pytest.raises(FieldError, match="release folder = .*does not exist yet"):
        write_release(release.folder, name="r2", student=base, base=base, lineage={}, scores={})
    assert files_of(release.folder) == before


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


def listed(release: Release, name: str, data: bytes) -> None:
    """Add a file to a release, and its hash to the manifest."""
    (release.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (release.folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": file_hash(release.folder / name)}
    edit_json(release.folder / "manifest.json", files={**release.manifest["files"], name: entry})


@pytest.mark.parametrize("name", ["text_encoder/pytorch_model.bin", "transformer/x.pt", "vae/model.pkl", "run.py"])
def test_a_file_that_could_run_code_is_refused_and_never_run(name: str, release: Release, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    listed(release, name, bomb)
    with pytest.raises(ReleaseError, match="could run code: allowed are .safetensors"):
        Release.load(release.folder)
    (release.folder / "manifest.json").write_text(json.dumps(release.manifest))
    with pytest.raises(ReleaseError, match="could run code"):  # nor when the manifest says nothing of it
        Release.load(release.folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_text_encoder_are_not_read_from_a_pickle(release: Release, tmp_path: Path) -> None:
    (release.folder / "text_encoder" / "model.safetensors").unlink()
    (release.folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(FieldError, match="safetensors"):
        release.text()
    assert not (tmp_path / "ran").exists()


def test_a_file_that_the_manifest_does_not_name_is_refused(release: Release) -> None:
    (release.folder / "transformer" / "more.safetensors").write_bytes(b"")
    with pytest.raises(ReleaseError, match="'transformer/more.safetensors' is not in manifest.json"):
        Release.load(release.folder)


@pytest.mark.parametrize("name", ["../outside.json", "vae/../../outside.json", "link.json"])
def test_no_file_of_a_release_lies_outside_of_it(name: str, release: Release) -> None:
    outside = release.folder.parent / "outside.json"
    outside.write_text("{}")
    (release.folder / "link.json").symlink_to(outside)
    entry = {"bytes": 2, "sha256": file_hash(outside)}
    files = {"link.json": entry, **release.manifest["files"], name: entry}
    edit_json(release.folder / "manifest.json", files=files)
    with pytest.raises(ReleaseError, match="lies outside of it"):
        Release.load(release.folder)


def test_a_release_is_promoted_only_when_its_manifest_says_so(release: Release) -> None:
    assert Release.load().promoted, "the embedded one"
    for changes, reason in (
        ({}, "nobody judged it"),
        ({"promoted": "yes"}, "nobody judged it"),
        ({"promoted": False}, "judged and not promoted"),
        ({"promoted": False, "promotion_reasons": ["colours fade", "it flickers"]}, "colours fade; it flickers"),
    ):
        edit_json(release.folder / "manifest.json", **changes)
        loaded = Release.load(release.folder)
        assert not loaded.promoted
        with pytest.raises(ReleaseError, match=f"r1 in .* is not promoted: .*{reason}.*allow_unpromoted: true"):
            loaded.check_promoted()
    edit_json(release.folder / "manifest.json", promoted=True)
    Release.load(release.folder).check_promoted()


@pytest.mark.slow
def test_a_copy_from_s3_is_the_newest_or_the_last_one_offline(
    s3: Any, faulty: FaultyProxy, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagonal.storage.fetch._FRESH_S", 0.2)
    upload(s3, release.folder, "r1")
    assert not Release.load("s3://models/r1").promoted
    edit_json(release.folder / "manifest.json", promoted=True)
    s3.upload_file(str(release.folder / "manifest.json"), "models", "r1/manifest.json")
    assert Release.load("s3://models/r1").promoted
    with faulty.outage():
        assert Release.load("s3://models/r1").promoted  # as far as this machine knows
    edit_json(release.folder / "manifest.json", files={**release.manifest["files"], "config.json": {"sha256": "0"}})
    s3.upload_file(str(release.folder / "manifest.json"), "models", "r1/manifest.json")
    with pytest.raises(ReleaseError, match="config.json is missing or differs"):
        Release.load("s3://models/r1")
