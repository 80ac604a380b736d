"""What serving options cost: the same clips, from equal noise, under several settings of one release."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.noise import Salt, mixed_seed
from diagonal.evaluate.quality.sources import Student, clip_seeds, draw_captions, in_batches, judge, own_world
from diagonal.model.base_model import load_codec
from diagonal.model.cache import new_pool
from diagonal.model.release import Release
from diagonal.model.vae import Decoder, encode_clips

Rows = Mapping[str, Sequence[str]]
TIMED_ROUNDS = 5


def psnr_db(shown: Tensor, wanted: Tensor) -> float:
    """Peak signal to noise ratio of uint8 pixels over all of them; infinite where they are equal."""
    error = ((shown.double() - wanted.double()) / 255).square().mean()
    return -10 * math.log10(float(error)) if error > 0 else math.inf


def compare_options(
    release: Release, rows: Rows, clips: int, seed: int, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """For each row's settings: the oracle's scores, the PSNR to the first row's pixels from equal noise (None where
    they are the same), and what one session's K/V takes."""
    world = own_world(release.config)
    captions, seeds = draw_captions(clips, seed, world.captions()), clip_seeds(clips, seed)
    found: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for name, settings in rows.items():
        varied = release.with_settings(settings)
        pixels = in_batches(Student.of(varied), captions, seeds)
        reference = pixels if reference is None else reference
        value = psnr_db(pixels, reference)
        scores = judge(pixels, captions, world)
        found.append(
            {
                "name": name,
                "settings": list(settings),
                "scores": scores,
                "psnr_db": None if math.isinf(value) else round(value, 2),
                "kv_bytes_per_session": kv_bytes(varied),
            }
        )
        say(f"{name}: PSNR {value:.2f} dB, shape {scores['shape']['mean']:.3f}")
    return found


def kv_bytes(release: Release) -> int:
    """Bytes of K/V of one session with a full window."""
    config = release.config
    return new_pool(
        config, release.generator(), config.cache.window_frames // config.geometry.chunk_frames
    ).capacity_bytes


def codec_psnr_db(release: Release, clips: int, seed: int) -> float:
    """PSNR to the world's own pixels of what the release's decoder makes of their latents."""
    codec, decoder, world = load_codec(release.folder, release.config), release.decoder(), own_world(release.config)
    originals = [
        torch.from_numpy(world.render(caption, mixed_seed(seed, Salt.CODEC, number))).unsqueeze(0)
        for number, caption in enumerate(draw_captions(clips, seed, world.captions()))
    ]
    shown = torch.cat([decoder.decode_clip(encode_clips(codec, clip)) for clip in originals])
    return psnr_db(shown, torch.cat(originals))


def chunk_decode_ms(decoder: Decoder, config: Config) -> dict[str, float]:
    """Milliseconds to decode one later chunk of one stream: the median and the least of several clips' chunks."""
    shape, chunks = config.geometry.chunk_shape(), config.geometry.clip_chunks
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    for round_ in range(TIMED_ROUNDS + 1):
        state = decoder.start()
        decoder.decode(latents, state)
        for _ in range(chunks - 1):
            started_s = time.perf_counter()
            decoder.decode(latents, state)
            if round_:
                times.append(1000 * (time.perf_counter() - started_s))
    return {"median": round(sorted(times)[len(times) // 2], 2), "least": round(min(times), 2)}
