"""A base model in every layout that is met: what can be loaded is, and what cannot is named before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diagonal.errors import FieldError
from diagonal.jsonfile import write_json
from diagonal.model.base_check import check_base, stray_files
from diagonal.model.base_model import load_causal, load_codec, load_teacher, load_text
from diagonal.model.release import Release, write_release
from diagonal.storage import Folder
from tests.hub import SmallHub
from tests.model.folders import TRANSFORMER, edit_json, files_of
from tests.networks import small_config, small_text_model, small_wan

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]


def pointer(name: str) -> Change:
    return lambda base: (base / name).write_bytes(POINTER)


def half(name: str) -> Change:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:-100])


def config(part: str, **changes: object) -> Change:
    return lambda base: edit_json(base / part / "config.json", **changes)


def index(**parts: object) -> Change:
    return lambda base: write_json(base / "model_index.json", {"_class_name": "WanPipeline", **parts})


def renamed(name: str, new: str) -> Change:
    return lambda base: (base / name).rename(base / name.split("/")[0] / new)


def sharded_without(base: Path) -> None:
    (base / TRANSFORMER).unlink()
    small_wan().save_pretrained(base / "transformer", max_shard_size="20KB")
    sorted((base / "transformer").glob("*-of-*.safetensors"))[1].unlink()


def shards_without_index(base: Path) -> None:
    sharded_without(base)
    (base / "transformer/diffusion_pytorch_model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pointer(TRANSFORMER), "transformer weights = .*not a Git LFS pointer"),
        (pointer(TEXT), "text_encoder weights = .*not a Git LFS pointer"),
        (pointer(VAE), "vae weights = .*not a Git LFS pointer"),
        (pointer("tokenizer/tokenizer.json"), "tokenizer = .*not a Git LFS pointer"),
        (pointer("transformer/config.json"), "transformer/config.json.*JSON"),
        (half(TRANSFORMER), "transformer weights = .*a whole .safetensors file"),
        (half(TEXT), "text_encoder weights = .*a whole .safetensors file"),
        (sharded_without, "file = .*-of-.*a file that exists"),
        (shards_without_index, "transformer weights = .*index.json with its shards"),
        (
            renamed(TEXT, "pytorch_model.bin"),
            "text_encoder weights = .*pytorch_model.bin.*pickled weights are not read",
        ),
        (config("transformer", num_layers=30), "transformer missing_keys = .*blocks.10"),
        (config("transformer", _class_name="WanVACETransformer3DModel"), "transformer = .*VACE"),
        (config("transformer", _class_name="SkyReelsV2Transformer3DModel"), "transformer = .*SkyReels"),
        (config("transformer", _class_name="WanAnimateTransformer3DModel"), "transformer = .*WanAnimate"),
        (config("transformer", image_dim=1280), "transformer = .*image to video"),
        (config("transformer", added_kv_proj_dim=5120), "transformer = .*image to video"),
        (config("transformer", in_channels=36), "transformer = .*image to video or Fun"),
        (config("transformer", in_channels=48, out_channels=48), "transformer.in_channels = 48: .*latent_channels"),
        (index(transformer_2=["diffusers", "WanTransformer3DModel"]), "transformer = .*Wan 2.2's two experts"),
        (lambda base: shutil.copytree(base / "transformer", base / "transformer_2"), "transformer = .*two experts"),
        (index(_class_name="WanImageToVideoPipeline"), "transformer = .*WanImageToVideoPipeline"),
        (config("vae", spatial_stride=16), "vae spatial_stride = 16"),
        (config("text_encoder", vocab_size=5), "tokenizer = 11: .*vocab_size = 5"),
    ],
)
def test_what_cannot_be_loaded_is_named_from_headers_alone(change: Change, said: str, base: Path) -> None:
    change(base)
    with pytest.raises(FieldError, match=said):
        check_base(Folder(str(base)), small_config())


def as_fp16(base: Path) -> None:
    for name in (TRANSFORMER, TEXT):
        (base / name).unlink()
    small_wan().half().save_pretrained(base / "transformer", variant="fp16")
    small_text_model().half().save_pretrained(base / "text_encoder", variant="fp16")


def as_fp16_shards(base: Path) -> None:
    for name in (TRANSFORMER, TEXT):
        (base / name).unlink()
    small_wan().half().save_pretrained(base / "transformer", variant="fp16", max_shard_size="20KB")
    small_text_model().half().save_pretrained(base / "text_encoder", variant="fp16", max_shard_size="2KB")


def as_shards(base: Path) -> None:
    for name in (TRANSFORMER, TEXT):
        (base / name).unlink()
    small_wan().save_pretrained(base / "transformer", max_shard_size="20KB")
    small_text_model().save_pretrained(base / "text_encoder", max_shard_size="2KB")


def with_foreign_keys(base: Path) -> None:
    edit_json(base / "transformer/config.json", model_type="t2v", text_len=512)
    index(transformer_2=[None, None], boundary_ratio=None)(base)


@pytest.mark.parametrize("change", [as_fp16, as_fp16_shards, as_shards, with_foreign_keys])
def test_what_passes_is_loaded_by_the_libraries_themselves(change: Change, base: Path) -> None:
    change(base)
    settings = small_config()
    check_base(Folder(str(base)), settings)
    teacher, student = load_teacher(base, settings), load_causal(base, settings)
    for name, value in small_wan().state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], value, rtol=5e-3, atol=1e-4)
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
    assert load_text(base, settings).encode(["a red circle"]).isfinite().all()
    load_codec(base, settings)


def test_a_release_leaves_stray_files_out_and_opens(base: Path, tmp_path: Path) -> None:
    for name in (
        "text_encoder/pytorch_model.bin",
        "vae/.cache/x.metadata",
        "tokenizer/tokenizer.json.bak",
        "README.md",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"stray")
    stray = ["text_encoder/pytorch_model.bin", "tokenizer/tokenizer.json.bak", "vae/.cache/x.metadata"]
    assert stray_files(Folder(str(base))) == stray
    release = write_release(tmp_path / "r", name="r", student=base, base=base, lineage={}, scores={})
    assert not set(stray) & files_of(release.folder).keys()
    assert Release.load(release.folder).text().encode(["a"]).isfinite().all()


def test_a_release_that_could_not_be_opened_is_not_written(base: Path, tmp_path: Path) -> None:
    pointer(VAE)(base)
    with pytest.raises(FieldError, match="vae weights"):
        write_release(tmp_path / "r", name="r", student=base, base=base, lineage={}, scores={})
    assert not (tmp_path / "r").exists()


def test_a_base_model_on_the_hub_is_checked_without_a_download(base: Path, hub: SmallHub) -> None:
    hub.add("org/wan", files_of(base))
    check_base(Folder("hf://org/wan"), small_config())
    hub.repos["org/wan"]["main"][VAE] = POINTER
    with pytest.raises(FieldError, match="vae weights = 'hf://org/wan/vae"):
        check_base(Folder("hf://org/wan"), small_config())
