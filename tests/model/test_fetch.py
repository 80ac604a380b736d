"""Where weights come from: a local folder, or one on S3 that is downloaded once and whole; the full preset in small."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diagonal.config import Config
from diagonal.diffusion.rollout import chunk_noise_of, denoise_chunk
from diagonal.errors import FieldError
from diagonal.model.base_model import base_folder, load_causal, load_decoder, load_teacher, load_text
from diagonal.model.cache import new_cache, new_pool
from diagonal.model.release import Release
from diagonal.storage import Folder, StorageError
from diagonal.storage.fetch import fetch, fetch_file
from tests.model.folders import files_of, upload
from tests.networks import begun, small_config, small_text_model, small_tokenizer, small_vae, small_wan
from tests.s3 import FaultyProxy


def test_a_path_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="path = .*nowhere'.*existing folder, an s3"):
        fetch(str(tmp_path / "nowhere"))
    with pytest.raises(FieldError, match="path = .*nowhere"):
        Release.load(tmp_path / "nowhere")
    assert fetch(str(tmp_path)) == tmp_path
    assert base_folder(small_config(f"model.path={tmp_path}")) == tmp_path


@pytest.mark.slow
def test_a_folder_on_s3_is_downloaded_once_and_whole(s3: Any, release: Release, tmp_path: Path) -> None:
    upload(s3, release.folder, "deep/r1")
    folder = fetch("s3://models/deep/r1")
    assert files_of(folder) == files_of(release.folder) and folder.is_relative_to(tmp_path / "cache")
    assert Release.load("s3://models/deep/r1").folder == folder
    assert fetch("s3://models/deep/r1") == folder and Release.load(str(folder)).name == release.name
    with pytest.raises(FieldError, match="path = 's3://models/none': allowed is an s3:// folder that exists"):
        fetch("s3://models/none")


@pytest.mark.slow
def test_a_copy_that_is_there_needs_no_storage(s3: Any, faulty: FaultyProxy) -> None:
    s3.put_object(Bucket="models", Key="m/a.txt", Body=b"a")
    folder = fetch("s3://models/m")
    with faulty.outage():
        assert fetch("s3://models/m") == folder


@pytest.mark.slow
def test_a_download_that_breaks_leaves_nothing_and_can_be_repeated(
    s3: Any, faulty: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_object(Bucket="models", Key="m/a.txt", Body=b"a")
    s3.put_object(Bucket="models", Key="m/b.txt", Body=b"b" * 1000)
    faulty.fail(403, "AccessDenied", key="b.txt")
    with pytest.raises(StorageError, match="could not read s3://models/m/b.txt"):
        fetch("s3://models/m")
    assert faulty.count("GET", "a.txt") == 1
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock")
    faulty.mend()
    faulty.truncate(key="b.txt", times=1)
    assert files_of(fetch("s3://models/m")) == {"a.txt": b"a", "b.txt": b"b" * 1000}


@pytest.mark.slow
def test_a_second_upload_is_fetched_anew_and_only_what_changed(s3: Any, faulty: FaultyProxy) -> None:
    for name in ("large.safetensors", "manifest.json"):
        s3.put_object(Bucket="models", Key=f"m/{name}", Body=b"first")
    first = fetch("s3://models/m")
    s3.put_object(Bucket="models", Key="m/manifest.json", Body=b"second")
    second = fetch("s3://models/m")
    assert files_of(first) == {"large.safetensors": b"first", "manifest.json": b"first"}  # who reads it may go on
    assert files_of(second) == {"large.safetensors": b"first", "manifest.json": b"second"}
    assert faulty.count("GET", "large.safetensors") == 1
    s3.put_object(Bucket="models", Key="m/manifest.json", Body=b"first")
    assert fetch("s3://models/m") == first and faulty.count("GET", "manifest.json") == 2
    with faulty.outage():
        assert fetch("s3://models/m") == first  # the newest, by when it was last asked for


@pytest.mark.slow
def test_a_folder_that_changes_while_it_is_copied_is_copied_anew_and_never_mixed(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.json", "b.json"):
        s3.put_object(Bucket="models", Key=f"m/{name}", Body=b"first")
    get, uploads = Folder.get, iter([b"second"])

    def get_and_upload(folder: Folder, name: str, target: Path) -> None:
        get(folder, name, target)
        for data in uploads:
            for each in ("a.json", "b.json"):
                s3.put_object(Bucket="models", Key=f"m/{each}", Body=data)

    monkeypatch.setattr(Folder, "get", get_and_upload)
    found = fetch("s3://models/m")
    assert files_of(found) == {"a.json": b"second", "b.json": b"second"}
    assert [path for path in found.parent.iterdir() if path.is_dir()] == [found]
    numbers = itertools.count()

    def get_and_upload_once(folder: Folder, name: str, target: Path) -> None:
        get(folder, name, target)
        s3.put_object(Bucket="models", Key="m/a.json", Body=str(next(numbers)))

    s3.put_object(Bucket="models", Key="m/b.json", Body=b"third")
    monkeypatch.setattr(Folder, "get", get_and_upload_once)
    with pytest.raises(StorageError, match="changes while it is copied"):
        fetch("s3://models/m")


@pytest.mark.slow
def test_a_single_file_on_s3_is_known_by_what_is_in_it(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="models", Key="students/x.pt", Body=b"first")
    first = fetch_file("s3://models/students/x.pt")
    assert first.read_bytes() == b"first" == fetch_file("s3://models/students/x.pt").read_bytes()
    s3.put_object(Bucket="models", Key="students/x.pt", Body=b"second")
    second = fetch_file("s3://models/students/x.pt")
    assert second.read_bytes() == b"second" and first.name == second.name == "x.pt"
    with pytest.raises(FieldError, match="absent.pt.*a file that exists"):
        fetch_file("s3://models/students/absent.pt")
    assert fetch_file(str(first)) == first
    with pytest.raises(FieldError, match="an existing file"):
        fetch_file(str(tmp_path / "absent.pt"))


@pytest.mark.slow
def test_two_that_ask_at_once_download_once(s3: Any, faulty: FaultyProxy) -> None:
    s3.put_object(Bucket="models", Key="m/a.txt", Body=b"a")
    faulty.slow(0.5, method="GET", key="a.txt")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("s3://models/m"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert faulty.count("GET", "a.txt") == 1
    assert len(found) == 2 and len(set(found)) == 1 and (found[0] / "a.txt").read_bytes() == b"a"


def test_the_full_preset_goes_from_diffusers_folders_to_pixels(s3: Any, tmp_path: Path) -> None:
    """A folder as Wan-AI lays it out, written by diffusers' and transformers' own `save_pretrained`, read from S3."""
    config = Config.from_preset(
        "wan-1.3b",
        [
            "model.path=s3://models/wan",
            "geometry.latent_height=4",
            "geometry.latent_width=6",
            "geometry.latent_channels=4",
            "model.text_tokens=20",
        ],
    )
    folder = tmp_path / "wan"
    small_wan(layers=3).save_pretrained(folder / "transformer")
    small_vae().save_pretrained(folder / "vae")
    small_text_model().save_pretrained(folder / "text_encoder")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    upload(s3, folder, "wan")
    found = base_folder(config)
    dtype = getattr(torch, config.model.compute_dtype)
    assert dtype == torch.bfloat16
    teacher, student = load_teacher(found, config, dtype), load_causal(found, config, dtype)
    assert teacher.config.num_layers == student.config.num_layers == 3
    text = load_text(found, config, dtype).encode([config.model.negative_prompt, "a red circle"])[1:]
    assert text.shape == (1, 20, 16)
    cache = new_cache(config, new_pool(config, student, 4))
    noise = chunk_noise_of(config.geometry, [1], [0], "cpu")
    chunk = denoise_chunk(student, config.schedule, 0, text, begun(0, cache), noise)
    pixels = load_decoder(found, config).decode_clip(chunk.clean)
    assert pixels.shape == (1, 9, 32, 48, 3) and pixels.dtype == torch.uint8
    assert chunk.forwards == 4 and torch.isfinite(chunk.clean).all()
    assert cache.pool.keys.dtype == torch.bfloat16 and bool(cache.pool.keys[:, cache.pages[0]].any())
