"""A release with a fast decoder: an optional part, hashed like the others, served where the configuration says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diagonal.errors import FieldError
from diagonal.jsonfile import write_json
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder
from diagonal.model.fp8 import Fp8Linear
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release, write_release_with_decoder
from tests.model.folders import files_of
from tests.networks import CHANNELS, draw, roughen

WEIGHTS = "decoder/diffusion_pytorch_model.safetensors"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A folder as jobs/distill_decoder.py writes one, of the small configuration's strides."""
    network = FastDecoder(CHANNELS, widths=(8, 6, 4), blocks=(1, 1, 1))
    roughen(network)
    network.save_pretrained(tmp_path / "decoder")
    write_json(tmp_path / "decoder" / "lineage.json", {"psnr_db": 30.0})
    return tmp_path / "decoder"


@pytest.fixture
def fast(release: Release, decoder: Path, tmp_path: Path) -> Release:
    config = release.config.with_settings(["serve.decoder=fast"])
    return write_release_with_decoder(tmp_path / "fast", release, decoder, config)


def test_it_is_the_release_once_more_with_the_decoder_in_it(release: Release, fast: Release) -> None:
    before, after = files_of(release.folder), files_of(fast.folder)
    assert set(after) - set(before) == {WEIGHTS, "decoder/config.json", "decoder/lineage.json"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "manifest.json", "README.md", "model_index.json"}
    lineage = {"stage2": {"parent": "base"}, "decoder": {"psnr_db": 30.0}}
    assert fast.name == "r1-fast" and fast.manifest["lineage"] == lineage
    assert fast.manifest["scores"] == release.manifest["scores"] and not fast.promoted
    assert (fast.folder / "decoder").is_dir() and not (release.folder / "decoder").exists()
    assert set(fast.manifest["files"]) == set(after) - {"manifest.json"}


def test_the_decoder_that_the_configuration_names_is_served(release: Release, fast: Release) -> None:
    latents = draw(1, CHANNELS, 4, 4, 6)
    network = FastDecoder.from_pretrained(fast.folder / "decoder")
    assert torch.equal(fast.decoder().decode_clip(latents), StreamingFastDecoder(network).decode_clip(latents))
    full = Release.load(fast.folder).with_settings(["serve.decoder=full"])
    assert torch.equal(full.decoder().decode_clip(latents), release.decoder().decode_clip(latents))
    assert not torch.equal(full.decoder().decode_clip(latents), fast.decoder().decode_clip(latents))


def test_a_fast_decoder_that_the_release_has_not_is_refused_with_who_makes_one(release: Release) -> None:
    with pytest.raises(
        FieldError, match="serve.decoder = 'fast': allowed is full: .* has no decoder/, which jobs/dist"
    ):
        release.with_settings(["serve.decoder=fast"]).decoder()


def test_one_of_another_geometry_is_refused(release: Release, tmp_path: Path) -> None:
    FastDecoder(CHANNELS, 2, 8, (8, 6, 4), (1, 1, 1)).save_pretrained(tmp_path / "other")
    write_json(tmp_path / "other" / "lineage.json", {})
    wrong = write_release_with_decoder(tmp_path / "wrong", release, tmp_path / "other", release.config)
    with pytest.raises(FieldError, match="decoder temporal_stride = 2: allowed is geometry.temporal_stride = 4"):
        wrong.with_settings(["serve.decoder=fast"]).decoder()


def test_one_changed_byte_of_the_decoder_is_refused(fast: Release) -> None:
    data = bytearray((fast.folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (fast.folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ReleaseError, match=f"{WEIGHTS} is missing or differs"):
        Release.load(fast.folder)


def test_it_is_never_written_over_another(fast: Release, decoder: Path) -> None:
    with pytest.raises(FieldError, match="release folder"):
        write_release_with_decoder(fast.folder, fast, decoder, fast.config)


def test_a_second_decoder_takes_the_place_of_the_first(fast: Release, decoder: Path, tmp_path: Path) -> None:
    write_json(decoder / "lineage.json", {"psnr_db": 31.0})
    again = write_release_with_decoder(tmp_path / "again", fast, decoder, fast.config)
    assert again.manifest["lineage"]["decoder"] == {"psnr_db": 31.0}


def test_the_generator_has_8_bit_layers_where_the_configuration_says_so(release: Release) -> None:
    eight = release.with_settings(["serve.linear_dtype=fp8"]).generator()
    kinds = {type(part) for part in eight.blocks.modules() if "Linear" in type(part).__name__}
    assert kinds == {Fp8Linear}
    assert Fp8Linear not in {type(part) for part in release.generator().modules()}
