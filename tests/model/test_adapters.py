"""LoRA adapters of others: merged when a release is loaded, put on and taken off in a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from diagonal.engine.snapshot import Identity
from diagonal.errors import FieldError
from diagonal.model.release import Release
from diagonal.pipeline import DiagonalPipeline
from tests.engine.driving import PROMPT, engine_of, spec_of, stream
from tests.model.test_import_checkpoints import wan_name
from tests.networks import draw, small_causal

LAYERS = ["to_q", "to_v", "ffn.net.2"]


def adapted(release: Release, layers: list[str] = LAYERS, alpha: int = 2) -> Any:
    """The release's network with peft's LoRA of rank 2 on those layers."""
    model = get_peft_model(release.generator(), LoraConfig(r=2, lora_alpha=alpha, target_modules=layers))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora" in name:
            parameter.data = draw(*parameter.shape, seed=number) * 0.3
    return model


def pairs(model: Any, prefix: str) -> dict[str, Tensor]:
    found = get_peft_model_state_dict(model).items()
    return {name.replace("base_model.model.", prefix): value.clone() for name, value in found}


def diffusers_file(model: Any, folder: Path) -> Path:
    save_file(pairs(model, "transformer."), folder / "diffusers.safetensors", {"format": "pt"})
    return folder / "diffusers.safetensors"


def wan_file(model: Any, folder: Path) -> Path:
    named = {f"diffusion_model.{wan_name(name)}": value for name, value in pairs(model, "").items()}
    save_file(named, folder / "wan.safetensors", {"format": "pt"})
    return folder / "wan.safetensors"


def peft_folder(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "peft")
    return folder / "peft" / "adapter_model.safetensors"


def clip(release: Release) -> np.ndarray[Any, Any]:
    chunks = stream(engine_of(release=release), spec_of(frames=21, seed=7))  # type: ignore[arg-type]
    return np.concatenate([chunk.pixels.numpy() for chunk in chunks])


@pytest.mark.parametrize("write", [diffusers_file, wan_file, peft_folder], ids=lambda write: write.__name__)
def test_a_release_is_loaded_with_its_adapters_as_peft_merges_them(
    write: Any, release: Release, tmp_path: Path
) -> None:
    model = adapted(release, alpha=6 if write is peft_folder else 2)
    file = write(model, tmp_path)
    found = release.with_settings([f'model.adapters=["{file}"]']).generator().state_dict()
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    plain = release.generator().state_dict()
    assert not torch.allclose(found["blocks.0.attn1.to_q.weight"], plain["blocks.0.attn1.to_q.weight"], atol=1e-2)


def test_a_stream_does_not_go_on_without_its_adapters(release: Release, tmp_path: Path) -> None:
    other = release.with_settings([f'model.adapters=["{diffusers_file(adapted(release), tmp_path)}"]'])
    assert Identity.of(other) != Identity.of(release)


@pytest.mark.parametrize("layers", [LAYERS, ["to_q"]])
def test_a_pipeline_puts_an_adapter_on_and_takes_it_off(layers: list[str], release: Release, tmp_path: Path) -> None:
    file = diffusers_file(adapted(release, layers), tmp_path)
    merged = clip(release.with_settings([f'model.adapters=["{file}"]']))
    pipe = DiagonalPipeline.from_pretrained(release.folder)
    pipe.set_progress_bar_config(disable=True)

    def frames() -> np.ndarray[Any, Any]:
        made: np.ndarray[Any, Any] = np.round(pipe(PROMPT, num_frames=21, generator=7).frames[0] * 255.0)
        return made

    before = frames()
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="style")
    assert np.abs(frames() - merged).max() <= 1 and np.abs(frames() - before).max() > 1
    pipe.set_adapters("style", 0.0)
    assert np.abs(frames() - before).max() <= 1
    pipe.unload_lora_weights()
    assert np.array_equal(frames(), before)


def test_projections_are_taken_apart_again_as_they_were() -> None:
    network, expected = small_causal(), small_causal().state_dict()
    network.fuse()
    network.unfuse()
    found = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_no_adapter_of_the_network_is_refused(release: Release, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file(
        {f"transformer.blocks.0.attn1.to_q.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"},
        tmp_path / "shape.safetensors",
    )
    for name in ("other", "shape"):
        with pytest.raises(FieldError, match=r"model.adapters.*a LoRA that fits this network") as refusal:
            release.with_settings([f'model.adapters=["{tmp_path}/{name}.safetensors"]']).generator()
        assert "\n" not in str(refusal.value)
    with pytest.raises(FieldError, match="existing file"):
        release.with_settings(['model.adapters=["none.safetensors"]']).generator()


def test_an_adapter_on_8_bit_weights_is_refused(release: Release, tmp_path: Path) -> None:
    pipe = DiagonalPipeline.from_pretrained(release.folder)
    pipe.transformer.blocks[0].ffn.net[2] = torch.nn.Identity()  # in the place of a Fp8Linear, which needs a GPU
    with pytest.raises(FieldError, match="adapter = 'Identity'.*not 8-bit"):
        pipe.load_lora_weights(str(diffusers_file(adapted(release), tmp_path)))
