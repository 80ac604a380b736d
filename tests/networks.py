"""Small models of Wan's own kind and configurations that fit them, and exact float64: what tests of the core share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5TokenizerFast, UMT5Config, UMT5EncoderModel

from diagonal.config import Config
from diagonal.geometry import ChunkGeometry
from diagonal.model.architecture import constructor_settings
from diagonal.model.cache import CacheBatch, KVCache, KVPool, new_cache
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder, LinearCodec, decoder_of

CHANNELS, TEXT_DIM, TEXT_TOKENS = 4, 16, 6
WORDS = ("a", "red", "blue", "circle", "square", "moves", "left", "right")
SMALL = (
    f"geometry.latent_channels={CHANNELS}",
    "geometry.latent_height=4",
    "geometry.latent_width=6",
    f"model.text_tokens={TEXT_TOKENS}",
    "serve.max_sessions=4",
    "serve.pixel_scale=1",
)


def small_config(*settings: str) -> Config:
    """Wan's chunks, window and schedule over 4x6 latents: 6 tokens a frame, 18 a chunk; height and width differ."""
    return Config.from_preset("tiny", (*SMALL, *settings))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def roughen(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter off its initial value, so that a norm's weight or a bias that is left out is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def small_wan(seed: int = 0, *, layers: int = 2, **layout: Any) -> WanTransformer3DModel:
    """diffusers' own network with random weights, in float32, not training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": CHANNELS,
                "out_channels": CHANNELS,
                "text_dim": TEXT_DIM,
                "freq_dim": 32,
                "ffn_dim": 48,
                "num_layers": layers,
                **layout,
            }
        )
    roughen(network, seed)
    return network.eval()


def small_causal(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> CausalWan:
    """Our network over the weights of `small_wan`; float64 throughout where asked for (see `exact_float64`)."""
    wan = small_wan(seed, layers=layers)
    with torch.random.fork_rng(devices=[]):
        network = CausalWan(**constructor_settings(CausalWan, wan.config))
    network.load_state_dict(wan.state_dict())
    return (network if dtype == torch.float32 else network.to(dtype)).eval()


def exact_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave float64 tensors as they are where code says `.float()`, so that a law can be held to float64's rounding."""
    narrow = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))


def caches_for(
    config: Config, network: nn.Module, sessions: int = 1, *, chunks: int = 12, recycle: bool = True
) -> list[KVCache]:
    """One empty cache a session over one pool, in the network's own dtype."""
    layout: Any = network.config
    pool = KVPool(
        layers=layout.num_layers,
        heads=layout.num_attention_heads,
        head_dim=layout.attention_head_dim,
        page_tokens=config.geometry.chunk_tokens,
        pages=sessions * chunks,
        dtype=next(network.parameters()).dtype,
    )
    return [new_cache(config, pool, recycle=recycle) for _ in range(sessions)]


def begun(chunk: int, *caches: KVCache) -> CacheBatch:
    """The caches with that chunk in progress, as one batch."""
    for cache in caches:
        cache.begin(chunk)
    return CacheBatch(caches)


def small_tokenizer() -> PreTrainedTokenizerBase:
    """A T5 tokenizer over a handful of words."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=[*special, *((f"▁{word}", -1.0) for word in WORDS)], extra_ids=0)


def small_text_model(seed: int = 0) -> UMT5EncoderModel:
    """A umT5 encoder with random weights that fits `small_tokenizer` and `small_wan`."""
    layout = UMT5Config(
        vocab_size=3 + len(WORDS),
        d_model=TEXT_DIM,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(layout)
    roughen(model, seed)
    return model.eval().requires_grad_(False)


def small_text(seed: int = 0) -> TextEncoder:
    return TextEncoder(small_tokenizer(), small_text_model(seed), TEXT_TOKENS)


def small_vae(seed: int = 0, *, patch_size: int | None = None, depth: int = 1) -> AutoencoderKLWan:
    """diffusers' video codec with Wan2.1's levels and strides and few channels; in patches as Wan2.2 has it.

    `depth` is the number of residual blocks at a level, 2 in Wan's own."""
    colours = 3 * (patch_size or 1) ** 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=depth,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 1.5, 0.5],
            in_channels=colours,
            out_channels=colours,
            patch_size=patch_size,
            is_residual=patch_size is not None,
        )
    return vae.eval().requires_grad_(False)


def small_codec(config: Config) -> LinearCodec:
    """A linear codec fitted to smooth random clips of that size; one for all tests, not to be changed."""
    return _fitted_codec(config.geometry)


@functools.cache
def _fitted_codec(geometry: ChunkGeometry) -> LinearCodec:
    coarse = draw(24, 3, 3, 4, 4, seed=7)
    size = (5, geometry.pixel_height, geometry.pixel_width)
    clips = nn.functional.interpolate(coarse, size, mode="trilinear").permute(0, 2, 3, 4, 1)
    pixels = (clips * 60.0 + 128.0).clamp(0, 255).to(torch.uint8)
    return LinearCodec.fit(pixels, geometry.latent_channels, motion_channels=1).eval()


@dataclass
class SmallRelease:
    """What an engine asks of a `Release`, held in memory; a test may put a part of its own in the place of any."""

    config: Config
    network: nn.Module
    encoder: Any
    codec: Decoder
    name: str = "small"
    manifest: Mapping[str, Any] = field(default_factory=lambda: {"files": {}})

    def generator(self, device: torch.device | str = "cpu") -> nn.Module:
        return self.network.to(device).requires_grad_(False)

    def text(self, device: torch.device | str = "cpu") -> Any:
        return self.encoder

    def decoder(self, device: torch.device | str = "cpu") -> Decoder:
        return self.codec


def small_release(*settings: str) -> SmallRelease:
    """A release of random weights; settings as for `small_config`."""
    config = small_config(*settings)
    return SmallRelease(config, small_causal(), small_text(), decoder_of(small_codec(config)))


WAN_1_3B: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
}
WAN_14B = {**WAN_1_3B, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
