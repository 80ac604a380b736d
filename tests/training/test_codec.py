"""The embedded autoencoder learns the linear codec's latents, in both directions."""

from collections.abc import Mapping

import pytest
import torch

from diagonal.config import Config
from diagonal.data.world import WorldConfig, sample_clips, world_of
from diagonal.model.base_model import embedded, load_codec
from diagonal.model.vae import decoder_of, encode_clips
from diagonal.training.codec import train_vae
from diagonal.training.pretrain import fit_codec
from tests.networks import small_vae


@pytest.mark.slow
@pytest.mark.nightly
def test_both_halves_of_the_autoencoder_come_nearer_to_the_linear_codec() -> None:
    small = [f"pretrain.codec_{name}" for name in ("clips=16", "updates=40", "width=4")]
    config = Config.from_preset("tiny", small)
    losses: dict[tuple[str, int], float] = {}

    def report(update: int, figures: Mapping[str, float]) -> None:
        losses.update({(name, update): value for name, value in figures.items()})

    train_vae(config, fit_codec(config), report)
    for half in ("decoder_loss", "encoder_loss"):
        first, last = (sum(losses[half, update] for update in span) / 5 for span in (range(1, 6), range(36, 41)))
        assert last < 0.95 * first, half
    assert len(losses) == 2 * 40


@pytest.mark.slow
def test_the_shipped_codec_keeps_27_db_from_pixels_to_pixels() -> None:
    config = Config.from_preset("tiny")
    codec = load_codec(embedded("base"), config)
    clips = torch.from_numpy(sample_clips(77, 8, world_of(config))[1])
    shown = decoder_of(codec).decode_clip(encode_clips(codec, clips))
    error = ((shown.float() - clips.float()) / 255).square().mean()
    assert -10 * float(error.log10()) >= 27.0


def test_latents_are_normalised_by_the_means_and_deviations_that_the_decoder_takes_back() -> None:
    vae = small_vae(patch_size=None)
    clips = torch.from_numpy(sample_clips(5, 2, WorldConfig(pixel_frames=9))[1])
    latents = vae.encode((clips.float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3)).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(encode_clips(vae, clips) * std + mean, latents)
    assert float((encode_clips(vae, clips) - latents).abs().max()) > 0.1
