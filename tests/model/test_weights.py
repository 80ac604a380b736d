"""Weights on disk: what loads, what is refused by name, and that nothing half-written has a final name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from diffusers import WanTransformer3DModel
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file

from diagonal.config import Config
from diagonal.diffusion.rollout import chunk_noise_of, denoise_chunk, new_cache, new_pool
from diagonal.errors import FieldError
from diagonal.model import weights
from diagonal.model.weights import (
    Release,
    ReleaseError,
    base_folder,
    fetch,
    load_causal,
    load_codec,
    load_decoder,
    load_teacher,
    load_text,
    save_base,
    save_student,
    write_release,
)
from tests.networks import (
    begun,
    draw,
    small_causal,
    small_codec,
    small_config,
    small_text_model,
    small_tokenizer,
    small_vae,
    small_wan,
)

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of the small configuration, written by `save_base`."""
    config, folder = small_config(), tmp_path / "base"
    save_base(folder, config, small_wan(), small_codec(config), small_tokenizer(), small_text_model(), {"seed": 0})
    return folder


@pytest.fixture
def release(base: Path, tmp_path: Path) -> Release:
    return write_release(
        tmp_path / "release", name="r1", student=base, base=base, lineage={"parent": "base"}, scores={"colour": 0.5}
    )


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of an S3 service in this process, with a bucket named `models`; pyarrow finds it by its environment."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true",
        "DIAGONAL_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    server.stop()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Students and base models


def test_what_we_save_is_diffusers_own_class_and_loads_there(tmp_path: Path) -> None:
    network = small_causal(layers=3)
    save_student(tmp_path / "student", small_config(), network.config, network.state_dict(), {"stage": "stage2"})
    layout = json.loads((tmp_path / "student/transformer/config.json").read_text())
    assert layout["_class_name"] == "WanTransformer3DModel"
    wan, found = WanTransformer3DModel.from_pretrained(tmp_path / "student/transformer", output_loading_info=True)
    assert not any(found.values())
    mine, theirs = network.state_dict(), wan.state_dict()
    kept = ("time_embedder", "scale_shift_table", "norm2")
    for name, value in mine.items():
        stored = value if any(part in name for part in kept) else value.bfloat16().float()
        assert torch.equal(theirs[name], stored), name
    assert json.loads((tmp_path / "student/lineage.json").read_text()) == {"stage": "stage2"}
    assert Config.load(tmp_path / "student/config.json") == small_config()


def test_saving_draws_no_random_number_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    network = small_causal()
    before, weight = torch.random.get_rng_state(), network.proj_out.weight.clone()
    save_student(tmp_path / "student", small_config(), network.config, network.state_dict(), {})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(network.proj_out.weight, weight) and network.proj_out.weight.dtype == torch.float32


def test_a_base_model_returns_from_its_folder(base: Path) -> None:
    config = small_config()
    teacher, student = load_teacher(base, config), load_causal(base, config)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    text, codec = load_text(base, config), load_codec(base, config)
    assert text.encode(["a red circle"]).shape == (1, 6, 16)
    latents = draw(1, 4, 3, 4, 6)
    assert torch.equal(load_decoder(base, config).decode_clip(latents),
                       weights.decoder_of(small_codec(config)).decode_clip(latents))
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert (base / "scheduler/scheduler_config.json").is_file()


def test_in_bfloat16_the_parts_that_wan_keeps_stay_in_float32(base: Path) -> None:
    network = load_causal(base, small_config(), torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert types["proj_out.weight"] == torch.bfloat16
    assert types["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert types["blocks.0.scale_shift_table"] == types["scale_shift_table"] == torch.float32
    assert network.rope.freqs_cos.dtype == torch.float32


@pytest.mark.parametrize("load", [load_teacher, load_causal])
def test_a_network_of_another_geometry_is_refused_by_name(load: Any, base: Path) -> None:
    with pytest.raises(FieldError, match="transformer.in_channels = 4: allowed is geometry.latent_channels = 16"):
        load(base, small_config("geometry.latent_channels=16"))
    with pytest.raises(FieldError, match=r"transformer.patch_size = \[1, 2, 2\]: allowed is \[1, 1, 2\]"):
        load(base, small_config("geometry.patch_height=1"))


@pytest.mark.parametrize("load", [load_teacher, load_causal])
def test_a_network_for_another_text_encoder_is_refused_by_name(load: Any, base: Path) -> None:
    edit_json(base / "text_encoder/config.json", d_model=4096)
    with pytest.raises(FieldError, match="transformer.text_dim = 16: allowed is .*d_model = 4096"):
        load(base, small_config())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("geometry.latent_channels=8", "vae latent_channels = 4: allowed is geometry.latent_channels = 8"),
        ("geometry.spatial_stride=16", "vae spatial_stride = 8: allowed is geometry.spatial_stride = 16"),
        ("geometry.temporal_stride=2", "vae temporal_stride = 4: allowed is geometry.temporal_stride = 2"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "wan"])
def test_a_codec_of_another_geometry_is_refused_by_name(kind: str, setting: str, message: str, base: Path) -> None:
    if kind == "wan":
        small_vae().save_pretrained(base / "vae")
    with pytest.raises(FieldError, match=message):
        load_codec(base, small_config(setting))


@pytest.mark.parametrize("name", ["temporal", "spatial"])
def test_a_codec_that_states_another_stride_is_refused_by_name(name: str, base: Path) -> None:
    small_vae().save_pretrained(base / "vae")
    edit_json(base / "vae/config.json", **{f"scale_factor_{name}": 2})
    with pytest.raises(FieldError, match=f"vae {name}_stride = 2: allowed is geometry.{name}_stride"):
        load_codec(base, small_config())


def test_a_codec_of_an_unknown_class_is_refused_with_the_known_ones(base: Path) -> None:
    edit_json(base / "vae/config.json", _class_name="AutoencoderKL")
    with pytest.raises(FieldError, match=r"vae._class_name = 'AutoencoderKL': .*AutoencoderKLWan.*LinearCodec"):
        load_codec(base, small_config())


@pytest.mark.parametrize(
    ("part", "load"),
    [("transformer", load_teacher), ("transformer", load_causal), ("vae", load_codec), ("text_encoder", load_text),
     ("tokenizer", load_text)],
)  # fmt: skip
def test_a_missing_folder_is_refused_by_name(part: str, load: Any, base: Path) -> None:
    (base / part).rename(base / "elsewhere")
    with pytest.raises(FieldError, match=f"{part} folder = .*{part}'.*diffusers' layout"):
        load(base, small_config())


def test_a_codec_folder_without_its_config_is_refused_by_name(base: Path) -> None:
    (base / "vae/config.json").unlink()
    with pytest.raises(FieldError, match="vae/config.json.*exists"):
        load_codec(base, small_config())


@pytest.mark.parametrize("load", [load_teacher, load_causal])
def test_weights_of_another_depth_than_the_config_says_are_refused(load: Any, base: Path) -> None:
    """diffusers itself would fill the missing layer with random numbers and say so in a warning."""
    edit_json(base / "transformer/config.json", num_layers=3)
    with pytest.raises(FieldError, match="transformer missing_keys = .*blocks.2"):
        load(base, small_config())
    edit_json(base / "transformer/config.json", num_layers=1)
    with pytest.raises(FieldError, match="transformer unexpected_keys = .*blocks.1"):
        load(base, small_config())


def test_pickled_weights_are_never_read(base: Path) -> None:
    torch.save(load_file(base / TRANSFORMER), (base / TRANSFORMER).with_suffix(".bin"))
    (base / TRANSFORMER).unlink()
    for load in (load_teacher, load_causal):
        with pytest.raises(OSError, match="safetensors"):
            load(base, small_config())


def test_a_codec_without_one_of_its_tensors_is_refused(base: Path) -> None:
    path = base / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "basis"}, path)
    with pytest.raises(FieldError, match=r"vae missing_keys = \['basis'\]"):
        load_codec(base, small_config())


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("breaks", ["save_transformer", "write_json"])
def test_a_student_is_saved_whole_or_not_at_all(
    breaks: str, there_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, folder = small_causal(), tmp_path / "student"
    if there_before:
        save_student(folder, small_config(), network.config, network.state_dict(), {"update": 1})
    before = files_of(tmp_path)
    unbroken = getattr(weights, breaks)

    def break_in_the_middle(path: Path, *rest: Any) -> None:
        unbroken(path, *rest)
        raise OSError("the disk is full")

    monkeypatch.setattr(weights, breaks, break_in_the_middle)
    with pytest.raises(OSError, match="full"):
        save_student(folder, small_config(), network.config, network.state_dict(), {"update": 2})
    assert files_of(tmp_path) == before, "neither half of the new nor anything left over"
    assert folder.exists() == there_before


def test_a_student_saved_again_replaces_the_old_one_whole(tmp_path: Path) -> None:
    network, folder = small_causal(), tmp_path / "student"
    save_student(folder, small_config(), network.config, network.state_dict(), {"update": 1})
    (folder / "stray.txt").write_text("of the old one")
    save_student(folder, small_config(), network.config, network.state_dict(), {"update": 2})
    assert json.loads((folder / "lineage.json").read_text()) == {"update": 2}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "config.json", "config.json", "diffusion_pytorch_model.safetensors", "lineage.json"]
    assert folder.stat().st_mode & 0o555 == 0o555, "other users may read it"


# Releases


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


# Where weights come from


def test_a_path_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="path = .*nowhere'.*existing folder or an s3"):
        fetch(str(tmp_path / "nowhere"))
    with pytest.raises(FieldError, match="path = .*nowhere"):
        Release.load(tmp_path / "nowhere")
    assert fetch(str(tmp_path)) == tmp_path
    assert base_folder(small_config(f"model.path={tmp_path}")) == tmp_path


def upload(client: Any, folder: Path, prefix: str) -> None:
    for name, data in files_of(folder).items():
        client.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=data)


def test_a_folder_on_s3_is_downloaded_once_and_whole(s3: Any, release: Release, tmp_path: Path) -> None:
    upload(s3, release.folder, "deep/r1")
    folder = fetch("s3://models/deep/r1")
    assert files_of(folder) == files_of(release.folder) and folder.is_relative_to(tmp_path / "cache")
    assert Release.load("s3://models/deep/r1").folder == folder
    s3.delete_object(Bucket="models", Key=f"deep/r1/{TRANSFORMER}")
    assert fetch("s3://models/deep/r1") == folder and (folder / TRANSFORMER).is_file()
    with pytest.raises(FieldError, match="path = 's3://models/none': allowed is an s3:// folder that exists"):
        fetch("s3://models/none")


def test_a_download_that_breaks_leaves_nothing(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    s3.put_object(Bucket="models", Key="m/a.txt", Body=b"a")
    copy = fs.copy_files

    def break_off(source: str, target: str, **others: Any) -> None:
        copy(source, target, **others)
        raise OSError("connection reset")

    monkeypatch.setattr(fs, "copy_files", break_off)
    with pytest.raises(OSError, match="reset"):
        fetch("s3://models/m")
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())
    monkeypatch.undo()


def test_two_that_ask_at_once_download_once(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    s3.put_object(Bucket="models", Key="m/a.txt", Body=b"a")
    copies, copy, both = [], fs.copy_files, threading.Barrier(2, timeout=20)

    def count(*arguments: Any, **others: Any) -> None:
        copies.append(arguments)
        copy(*arguments, **others)

    monkeypatch.setattr(fs, "copy_files", count)
    found: list[Path] = []

    def ask() -> None:
        both.wait()
        found.append(fetch("s3://models/m"))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(copies) == 1 and len(set(found)) == 1 and (found[0] / "a.txt").read_bytes() == b"a"


# The full preset, in small


def test_the_full_preset_goes_from_diffusers_folders_to_pixels(s3: Any, tmp_path: Path) -> None:
    """A folder as Wan-AI lays it out, written by diffusers' and transformers' own `save_pretrained`, read from S3."""
    config = Config.from_preset("wan-1.3b", [
        "model.path=s3://models/wan", "geometry.latent_height=4", "geometry.latent_width=6",
        "geometry.latent_channels=4", "model.text_tokens=20",
    ])  # fmt: skip
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
