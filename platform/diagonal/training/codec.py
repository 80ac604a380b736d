"""Training of the embedded codec: an `AutoencoderKLWan` whose latents are those of the linear codec."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.diffusion.noise import Salt, generator, mixed_seed
from diagonal.model.vae import LinearCodec
from diagonal.training.pretrain import Report

PATCH = 2  # the full-resolution level, the expensive one, is folded into channels
LENGTHS = (9, 21)  # pixel frames of the clips it learns from


def build_vae(config: Config) -> AutoencoderKLWan:
    """An untrained small Wan autoencoder of the geometry's strides, from the seed; its latents need no scaling."""
    channels, colours = config.geometry.latent_channels, 3 * PATCH**2
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(config.seed, Salt.VAE))
        return AutoencoderKLWan(
            base_dim=config.pretrain.codec_width,
            z_dim=channels,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            in_channels=colours,
            out_channels=colours,
            patch_size=PATCH,
            scale_factor_spatial=config.geometry.spatial_stride,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )


def train_vae(config: Config, linear: LinearCodec, report: Report) -> AutoencoderKLWan:
    """Regress encoder and decoder to the linear codec's latents (free training of a small one collapses to the
    background: the shape is 7 % of the pixels). `report(update, figures)` every update of either half."""
    settings, vae = config.pretrain, build_vae(config)
    _, clips = embedded_world(config).sample(mixed_seed(config.seed, Salt.VAE_CLIPS) % 2**31, settings.codec_clips)
    draw, pixels = generator(config.seed, Salt.VAE), torch.from_numpy(clips)
    decoding = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    encoding = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    updates = settings.codec_updates
    for name, parameters in (("decoder", decoding), ("encoder", encoding)):
        optimizer = torch.optim.AdamW(parameters, lr=settings.codec_lr, betas=(0.9, 0.98), weight_decay=0.0)
        for update in range(1, updates + 1):
            optimizer.param_groups[0]["lr"] = settings.codec_lr * _rate(update, updates)
            chosen = torch.randint(len(pixels), (8,), generator=draw)
            length = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=draw))]
            clip = pixels[chosen][:, :length]
            loss = _decoder_loss(vae, linear, clip) if name == "decoder" else _encoder_loss(vae, linear, clip)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            report(update, {f"{name}_loss": float(loss.detach())})
    return vae.eval().requires_grad_(False)


def _decoder_loss(vae: AutoencoderKLWan, linear: LinearCodec, clip: Tensor) -> Tensor:
    """Squared and absolute error of the decoder's own pixels, before `decode` clamps them."""
    features, parts = [None] * vae._cached_conv_counts["decoder"], []
    for index, frame in enumerate(vae.post_quant_conv(linear.encode(clip)).split(1, dim=2)):
        parts.append(vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=index == 0))
    shown = unpatchify(torch.cat(parts, dim=2), patch_size=PATCH).permute(0, 2, 3, 4, 1)
    error = shown - (clip.float() / 127.5 - 1.0)
    return error.square().mean() + 0.1 * error.abs().mean()


def _encoder_loss(vae: AutoencoderKLWan, linear: LinearCodec, clip: Tensor) -> Tensor:
    """Squared error of the encoder's mean latents."""
    pixels = (clip.float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3)
    return (vae.encode(pixels, return_dict=False)[0].mode() - linear.encode(clip)).square().mean()


def _rate(update: int, updates: int) -> float:
    """Warm-up over 20 updates, constant, then a linear fall over the last half."""
    return min(1.0, update / 20, max(0.02, 2.0 * (updates - update) / updates))
