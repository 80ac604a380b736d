"""Weights on disk: what loads, what is refused by name, and that nothing half-written has a final name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.model import base_model
from diagonal.model.base_model import load_causal, load_codec, load_decoder, load_teacher, load_text, save_student
from tests.model.folders import TRANSFORMER, edit_json, files_of
from tests.networks import draw, small_causal, small_codec, small_config, small_vae


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
    assert json.loads((tmp_path / "student/lineage.json").read_text())["stage"] == "stage2"
    assert Config.load(tmp_path / "student/config.json") == small_config()


def test_saving_draws_no_random_number_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    network = small_causal()
    before, weight = torch.random.get_rng_state(), network.proj_out.weight.clone()
    save_student(tmp_path / "student", small_config(), network.config, network.state_dict(), {})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(network.proj_out.weight, weight) and network.proj_out.weight.dtype == torch.float32


@pytest.mark.slow
def test_a_base_model_returns_from_its_folder(base: Path) -> None:
    config = small_config()
    teacher, student = load_teacher(base, config), load_causal(base, config)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    text, codec = load_text(base, config), load_codec(base, config)
    assert text.encode(["a red circle"]).shape == (1, 6, 16)
    latents = draw(1, 4, 3, 4, 6)
    assert torch.equal(
        load_decoder(base, config).decode_clip(latents), base_model.decoder_of(small_codec(config)).decode_clip(latents)
    )
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
    [
        ("transformer", load_teacher),
        ("transformer", load_causal),
        ("vae", load_codec),
        ("text_encoder", load_text),
        ("tokenizer", load_text),
    ],
)
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
        with pytest.raises(FieldError, match="transformer weights = .*safetensors"):
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
    unbroken = getattr(base_model, breaks)

    def break_in_the_middle(path: Path, *rest: Any) -> None:
        unbroken(path, *rest)
        raise OSError("the disk is full")

    monkeypatch.setattr(base_model, breaks, break_in_the_middle)
    with pytest.raises(OSError, match="full"):
        save_student(folder, small_config(), network.config, network.state_dict(), {"update": 2})
    assert files_of(tmp_path) == before, "neither half of the new nor anything left over"
    assert folder.exists() == there_before


def test_a_student_saved_again_replaces_the_old_one_whole(tmp_path: Path) -> None:
    network, folder = small_causal(), tmp_path / "student"
    save_student(folder, small_config(), network.config, network.state_dict(), {"update": 1})
    (folder / "stray.txt").write_text("of the old one")
    save_student(folder, small_config(), network.config, network.state_dict(), {"update": 2})
    assert json.loads((folder / "lineage.json").read_text())["update"] == 2
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "config.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "lineage.json",
    ]
    assert folder.stat().st_mode & 0o555 == 0o555, "other users may read it"
