"""The fast decoder: causal, equal however a stream is cut, of the strides of any codec, and much cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder, frame_flops
from diagonal.model.vae import laid_out
from tests.networks import CHANNELS, draw, roughen

FRAMES = 9
LAYOUTS: dict[str, dict[str, Any]] = {
    "wan's strides": {"widths": (12, 10, 8), "blocks": (2, 1, 2)},
    "a level without blocks": {"widths": (12, 10, 8), "blocks": (1, 0, 1)},
    "four levels": {"widths": (12, 10, 8, 6), "blocks": (1, 1, 1, 1)},
    "other strides": {"widths": (8, 6), "blocks": (1, 1), "temporal_stride": 2, "spatial_stride": 4},
}


def network_of(layout: str = "wan's strides") -> FastDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FastDecoder(latent_channels=CHANNELS, **LAYOUTS[layout])
    roughen(network, 1)
    return network.eval().requires_grad_(False)


def decoder_of(layout: str = "wan's strides") -> StreamingFastDecoder:
    return StreamingFastDecoder(network_of(layout))


def latents_of(seed: int = 0, frames: int = FRAMES, batch: int = 1) -> Tensor:
    return 0.3 * draw(batch, CHANNELS, frames, 4, 6, seed=seed)


def in_chunks(decoder: StreamingFastDecoder, latents: Tensor, chunk_frames: int = 3) -> list[Tensor]:
    state = decoder.start()
    return [decoder.decode(part, state) for part in latents.split(chunk_frames, dim=2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_frames", [3, 1, 4])
def test_chunk_by_chunk_decode_equals_whole_clip_decode_bit_for_bit(layout: str, chunk_frames: int) -> None:
    decoder, latents = decoder_of(layout), latents_of(batch=2)
    whole = decoder.decode_clip(latents)
    assert torch.equal(torch.cat(in_chunks(decoder, latents, chunk_frames), dim=1), whole)
    assert whole.dtype == torch.uint8 and whole.float().std() > 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_frame_gives_one_pixel_frame_and_later_ones_the_stride(layout: str) -> None:
    network = network_of(layout)
    steps, stride = network.config.temporal_stride, network.config.spatial_stride
    parts = in_chunks(StreamingFastDecoder(network), latents_of())
    assert [part.shape[1] for part in parts] == [1 + 2 * steps, 3 * steps, 3 * steps]
    assert parts[1].shape[2:] == (4 * stride, 6 * stride, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_clip_at_once_as_in_training_is_the_stream(layout: str) -> None:
    network = network_of(layout)
    pixels = network(latents_of(), [None] * network.memories, True).permute(0, 1, 3, 4, 2)
    shown = (pixels.clamp(-1, 1) + 1) * 127.5
    streamed = StreamingFastDecoder(network).decode_clip(latents_of()).float()
    assert float((streamed - shown).abs().max()) <= 0.5 + 1e-2  # rounding to uint8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pixel_depends_on_no_later_latent_and_on_memory_frames_before_its_own(layout: str) -> None:
    network, latents = network_of(layout), latents_of()
    reach, steps = network.memory_frames, network.config.temporal_stride
    changed = latents.clone()
    changed[:, :, 2] += 1.0
    plain, other = (StreamingFastDecoder(network).decode_clip(clip) for clip in (latents, changed))
    differs = [frame for frame in range(plain.shape[1]) if not torch.equal(plain[:, frame], other[:, frame])]
    first = 1 + steps
    assert min(differs) == first and max(differs) < first + steps * (1 + reach)


def test_a_stream_resumed_from_more_than_its_memory_is_exact_and_from_less_is_not() -> None:
    network, latents = network_of(), latents_of(frames=12)
    decoder = StreamingFastDecoder(network)
    expected = in_chunks(decoder, latents)[-1]
    assert network.memory_frames == 3 < Config().serve.decoder_history_frames
    for history, same in ((network.memory_frames + 1, True), (1, False)):
        state = decoder.start()
        decoder.decode(latents[:, :, 9 - history : 9], state)
        assert torch.equal(decoder.decode(latents[:, :, 9:], state), expected) == same


def test_two_streams_on_one_decoder_do_not_disturb_each_other() -> None:
    decoder, clips = decoder_of(), [latents_of(1), latents_of(2)]
    alone = [in_chunks(decoder, clip) for clip in clips]
    states = [decoder.start(), decoder.start()]
    for chunk in range(3):
        for clip, state, expected in zip(clips, states, alone, strict=True):
            assert torch.equal(decoder.decode(clip[:, :, 3 * chunk : 3 * chunk + 3], state), expected[chunk])
    assert [state.frames for state in states] == [FRAMES, FRAMES]
    kept = [part for part in states[0].features if isinstance(part, Tensor)]
    assert len(kept) == 5 and all(part.untyped_storage().nbytes() == part.nbytes for part in kept)


def test_the_layout_in_memory_changes_no_more_than_rounding() -> None:
    plain, latents = decoder_of().decode_clip(latents_of()), latents_of()
    other = StreamingFastDecoder(laid_out(network_of(), "channels_last")).decode_clip(latents)
    assert int((plain.int() - other.int()).abs().max()) <= 1


def test_a_fast_decoder_keeps_through_its_folder(tmp_path: Path) -> None:
    network = network_of()
    network.save_pretrained(tmp_path)
    loaded = FastDecoder.from_pretrained(tmp_path)
    shown = [StreamingFastDecoder(part).decode_clip(latents_of()) for part in (network, loaded)]
    assert torch.equal(*shown) and {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        ({"widths": (8, 8), "blocks": (1,)}, "decoder.blocks"),
        ({"widths": (8,), "blocks": (1,)}, "decoder.temporal_stride"),
        ({"widths": (8, 8, 8), "blocks": (1, 1, 1), "temporal_stride": 3}, "decoder.temporal_stride"),
        ({"widths": (8, 8, 8), "blocks": (1, 1, 1), "spatial_stride": 6}, "decoder.spatial_stride"),
    ],
)
def test_a_layout_that_does_not_give_the_strides_is_refused(layout: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError, match=field):
        FastDecoder(**layout)


def test_at_832x480_a_latent_frame_costs_0_39_teraflops_a_35th_of_the_full_decoders() -> None:
    config = Config.from_preset("wan-1.3b")
    geometry = config.geometry
    network = FastDecoder(
        geometry.latent_channels,
        geometry.temporal_stride,
        geometry.spatial_stride,
        config.decoder.widths,
        config.decoder.blocks,
    )
    assert frame_flops(network, geometry.latent_height, geometry.latent_width) == 391_360_020_480
    assert 13.55e12 / 391_360_020_480 > 34
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_245_596
