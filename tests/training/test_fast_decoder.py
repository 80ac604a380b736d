"""Distilling the fast decoder: it learns what the full one shows, and goes on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from diagonal.config import Config
from diagonal.evaluate.quality.serving_options import psnr_db
from diagonal.model.fast_decoder import StreamingFastDecoder
from diagonal.model.vae import decoder_of
from diagonal.training.fast_decoder import (
    DecodedClips,
    DecoderTraining,
    begin_linear,
    decoded_clips,
    new_fast_decoder,
    pixel_loss,
    train_fast_decoder,
)
from tests.networks import CHANNELS, draw, small_causal, small_codec, small_config, small_text, small_vae

SETTINGS = (
    "decoder.widths=[12,8,6]",
    "decoder.blocks=[1,1,1]",
    "decoder.clips=6",
    "decoder.updates=6",
    "decoder.batch_size=2",
    "decoder.frames=3",
    "decoder.checkpoint_every=2",
    "decoder.crop_latents=0",
)


def config_of(*settings: str) -> Config:
    return small_config(*SETTINGS, *settings)


def clips_of(config: Config) -> DecodedClips:
    """Of a decoder that is not linear."""
    latents = draw(config.decoder.clips, CHANNELS, 8, 2, 3, seed=3)
    return DecodedClips(latents, decoder_of(small_vae()).decode_clip(latents))


def trained(config: Config, clips: DecodedClips, stop: int | None = None) -> tuple[DecoderTraining, list[float]]:
    """A training run to its end, or until its state of update `stop` was saved and loaded by another."""
    training, losses = DecoderTraining.new(config, "cpu"), list[float]()
    saved: dict[int, Mapping[str, Any]] = {}

    def report(update: int, figures: Mapping[str, float]) -> None:
        losses.append(figures["loss"])

    def save() -> None:
        kept = training.to_dict()
        saved[training.update] = {
            **kept,
            "network": {k: v.clone() for k, v in kept["network"].items()},
            "optimizer": _copied(kept["optimizer"]),
        }

    train_fast_decoder(config, training, clips, report, save)
    assert list(saved) == [2, 4, 6]
    if stop is not None:
        training = DecoderTraining.new(config, "cpu")
        training.load(saved[stop])
        losses = losses[:stop]
        train_fast_decoder(config, training, clips, report, lambda: None)
    return training, losses


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


@pytest.mark.slow
def test_it_comes_nearer_to_the_full_decoder_than_the_best_linear_one() -> None:
    config = config_of("decoder.updates=60", "decoder.checkpoint_every=60", "decoder.lr=0.01")
    clips, linear = clips_of(config), new_fast_decoder(config)
    begin_linear(linear, clips)
    training = DecoderTraining.new(config, "cpu")
    train_fast_decoder(config, training, clips, lambda update, figures: None, lambda: None)
    before, after = (
        psnr_db(StreamingFastDecoder(network).decode_clip(clips.latents), clips.pixels)
        for network in (linear, training.network)
    )
    assert after > before + 0.3


def test_of_a_linear_codec_the_first_network_is_the_decoder_but_for_rounding() -> None:
    config = config_of()
    latents = 0.3 * draw(6, CHANNELS, 21, 4, 6, seed=3)
    latents[:, :, 0] += 0.6 * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    clips = DecodedClips(latents, decoder_of(small_codec(config)).decode_clip(latents))
    network = new_fast_decoder(config)
    begin_linear(network, clips)
    found = StreamingFastDecoder(network).decode_clip(latents).int() - clips.pixels.int()
    assert int(found[:, 1:].abs().max()) <= 2


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_weights() -> None:
    config = config_of()
    clips = clips_of(config)
    (whole, losses), (resumed, others) = trained(config, clips), trained(config, clips, stop=2)
    assert losses == others and len(losses) == 6
    for one, other in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_that_of_pixels_and_of_their_changes_in_time_and_space() -> None:
    wanted = torch.zeros(1, 2, 3, 2, 2)
    shown = wanted.clone()
    shown[0, 1, 0, 0, 0] = 0.6  # one of 24 values: 3 of its neighbours' differences change
    changes = (0.36 / 12 + 0.36 / 12 + 0.36 / 12) / 3
    expected = 0.36 / 24 + 0.1 * 0.6 / 24 + 2.0 * changes
    assert float(pixel_loss(shown, wanted, 2.0)) == pytest.approx(expected)
    assert float(pixel_loss(wanted + 0.5, wanted, 2.0)) == pytest.approx(0.25 + 0.05)
    assert float(pixel_loss(shown[:, 1:], wanted[:, 1:], 0.0)) == pytest.approx(0.36 / 12 + 0.1 * 0.6 / 12)


def test_clips_are_the_students_cut_to_the_crop_and_decoded_in_full() -> None:
    config = config_of("decoder.clips=3", "decoder.crop_latents=2")
    decoder = decoder_of(small_codec(config))
    clips = decoded_clips(small_causal(), small_text(), decoder, config, ["a red circle", "a blue square"])
    assert clips.latents.shape == (3, CHANNELS, 21, 2, 2) and clips.pixels.shape == (3, 81, 16, 16, 3)
    assert torch.equal(decoder.decode_clip(clips.latents[1:2])[0], clips.pixels[1])
    again = decoded_clips(small_causal(), small_text(), decoder, config, ["a red circle", "a blue square"])
    assert torch.equal(clips.latents, again.latents) and not torch.equal(clips.latents[0], clips.latents[2])
