"""Codecs: a clip decoded chunk by chunk is the clip decoded whole, stream by stream."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.model.vae import Decoder, DecoderState, LinearCodec, WanDecoder, decoder_of, to_uint8
from tests.networks import CHANNELS, draw, small_codec, small_config, small_vae

KINDS = ["wan", "wan in patches", "linear"]
FRAMES = 9


def codec_of(kind: str) -> AutoencoderKLWan | LinearCodec:
    if kind == "linear":
        return small_codec(small_config())
    return small_vae(patch_size=2 if kind == "wan in patches" else None)


def latents_of(seed: int = 0, batch: int = 1) -> Tensor:
    return draw(batch, CHANNELS, FRAMES, 4, 4, seed=seed)


def in_chunks(decoder: Decoder, latents: Tensor, chunk_frames: int = 3) -> list[Tensor]:
    state = decoder.start()
    return [decoder.decode(part, state) for part in latents.split(chunk_frames, dim=2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_frames", [3, 1, 4])
def test_chunk_by_chunk_decode_equals_whole_clip_decode_bit_for_bit(kind: str, chunk_frames: int) -> None:
    decoder = decoder_of(codec_of(kind))
    parts, whole = in_chunks(decoder, latents_of(), chunk_frames), decoder.decode_clip(latents_of())
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert whole.dtype == torch.uint8 and whole.float().std() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_chunk_gives_9_pixel_frames_and_later_ones_12(kind: str) -> None:
    parts = in_chunks(decoder_of(codec_of(kind)), latents_of())
    assert [part.shape[1] for part in parts] == [9, 12, 12]
    assert parts[0].shape[-1] == 3 and parts[0].shape[2:4] == parts[1].shape[2:4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
def test_streaming_decode_is_diffusers_own_decode(kind: str) -> None:
    vae = codec_of(kind)
    assert isinstance(vae, AutoencoderKLWan)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        theirs = vae.decode(latents_of(batch=2) * std + mean).sample
    ours = torch.cat(in_chunks(decoder_of(vae), latents_of(batch=2)), dim=1)
    assert torch.equal(ours, to_uint8(theirs.permute(0, 2, 3, 4, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_on_one_decoder_do_not_disturb_each_other(kind: str) -> None:
    decoder, clips = decoder_of(codec_of(kind)), [latents_of(1), latents_of(2)]
    alone = [in_chunks(decoder, clip) for clip in clips]
    states = [decoder.start(), decoder.start()]
    for chunk in range(3):
        for clip, state, expected in zip(clips, states, alone, strict=True):
            assert torch.equal(decoder.decode(clip[:, :, 3 * chunk : 3 * chunk + 3], state), expected[chunk])
        if chunk == 0:
            decoder.decode_clip(latents_of(3))
    assert [state.frames for state in states] == [FRAMES, FRAMES]


@pytest.mark.slow
def test_a_stream_resumed_from_its_last_frames_is_nearly_the_same_and_exact_from_38() -> None:
    """Wan's own decoder layout: what a resumed session decodes (of 255: at most 2 from 24 frames, 109 from 12)."""
    decoder, latents = decoder_of(small_vae(depth=2)), draw(1, CHANNELS, 42, 2, 2)
    state = decoder.start()
    decoder.decode(latents[:, :, :-3], state)
    expected = decoder.decode(latents[:, :, -3:], state).int()
    worst = {}
    for history in (38, Config.from_preset("wan-1.3b").serve.decoder_history_frames, 12):
        state = decoder.start()
        decoder.decode(latents[:, :, -3 - history : -3], state)
        worst[history] = int((decoder.decode(latents[:, :, -3:], state).int() - expected).abs().max())
    assert worst[38] == 0 and worst[24] <= 4 and worst[12] > 20, worst


def test_pixels_are_clamped_and_rounded() -> None:
    pixels = torch.tensor([-7.0, -1.0, 0.0, 0.001, 0.0118, 1.0, 1.5], dtype=torch.float64)
    assert to_uint8(pixels).tolist() == [0, 0, 128, 128, 129, 255, 255]


def test_a_linear_codec_finds_the_latents_that_it_decoded() -> None:
    """But for the first: of its four pixel frames one alone is shown. What is left is rounding to uint8."""
    codec = small_codec(small_config())
    latents = 0.3 * latents_of(6)
    back = codec.encode(decoder_of(codec).decode_clip(latents))
    torch.testing.assert_close(back[:, :, 1:], latents[:, :, 1:], rtol=0, atol=0.05)


def test_a_linear_codec_gives_pictures_and_motion_channels_of_unit_variance() -> None:
    clips = (40.0 * draw(16, 9, 16, 16, 3, seed=1) + 128.0).clamp(0, 255).to(torch.uint8)
    codec = LinearCodec.fit(clips, 6, motion_channels=2)
    projected = (codec._blocks(clips) - codec.centre) @ codec.basis.T / codec.scale
    torch.testing.assert_close(projected.square().mean((0, 1, 2, 3)), torch.ones(6), rtol=1e-3, atol=0)
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(6), rtol=0, atol=1e-4)
    by_time = codec.basis.unflatten(1, (4, -1))
    torch.testing.assert_close(by_time[:4], by_time[:4, :1].expand(-1, 4, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(by_time[4:].sum(1), torch.zeros(2, by_time.shape[2]), rtol=0, atol=1e-5)


def test_a_linear_codec_keeps_what_its_channels_allow_with_the_least_error() -> None:
    clips = (40.0 * draw(16, 9, 16, 16, 3, seed=1) + 128.0).clamp(0, 255).to(torch.uint8)
    codec = LinearCodec.fit(clips, 6, motion_channels=2)
    blocks = codec._blocks(clips) - codec.centre
    still = blocks.unflatten(-1, (4, -1)).mean(-2, keepdim=True).expand(-1, -1, -1, -1, 4, -1).flatten(-2)

    def error(basis: torch.Tensor) -> float:
        return float((still @ basis.T @ basis - still).square().mean())

    turned = torch.linalg.qr(codec.basis[:4].T + 0.05 * draw(*codec.basis[:4].T.shape, seed=2))[0].T
    assert error(codec.basis[:4]) < error(turned)


def test_the_first_latent_frame_is_marked_and_decodes_without_its_mark() -> None:
    clips = (40.0 * draw(4, 9, 16, 16, 3, seed=1) + 128.0).clamp(0, 255).to(torch.uint8)
    marked, plain = (LinearCodec.fit(clips, 6, motion_channels=2, first_frame_mark=mark) for mark in (2.0, 0.0))
    shift = marked.encode(clips) - plain.encode(clips)
    assert torch.equal(shift[:, :, 1:], torch.zeros_like(shift[:, :, 1:]))
    expected = torch.tensor([2.0, -2.0]).repeat(3)[None, :, None, None].expand(4, -1, 2, 2)
    torch.testing.assert_close(shift[:, :, 0], expected, rtol=0, atol=1e-5)
    decoded = [decoder_of(codec).decode_clip(codec.encode(clips)).int() for codec in (marked, plain)]
    assert int((decoded[0] - decoded[1]).abs().max()) <= 1  # rounding


def test_a_linear_codec_keeps_through_its_folder(tmp_path: object) -> None:
    codec = small_codec(small_config())
    codec.save_pretrained(str(tmp_path))
    loaded = LinearCodec.from_pretrained(str(tmp_path))
    assert torch.equal(decoder_of(loaded).decode_clip(latents_of()), decoder_of(codec).decode_clip(latents_of()))


def test_a_clip_that_does_not_begin_with_one_frame_is_refused() -> None:
    with pytest.raises(FieldError, match="pixel_frames = 8: allowed is 1 more than a multiple of 4"):
        small_codec(small_config()).encode(torch.zeros(1, 8, 32, 48, 3, dtype=torch.uint8))


@pytest.mark.slow
def test_streams_decoded_as_one_batch_are_those_decoded_alone_within_rounding() -> None:
    decoder = decoder_of(small_vae())
    assert isinstance(decoder, WanDecoder)
    latents = draw(3, CHANNELS, 9, 4, 6, seed=5)
    alone, together = [decoder.start() for _ in latents], [decoder.start() for _ in latents]
    for start in range(0, 9, 3):
        chunk = latents[:, :, start : start + 3]
        assert decoder.can_join(together) and not decoder.can_join(together[:1])
        found = decoder.decode_together(chunk, together)
        for part, state, pixels in zip(chunk, alone, found, strict=True):
            assert (decoder.decode(part[None], state)[0].int() - pixels.int()).abs().max() <= 1
    for mine, theirs in zip(alone, together, strict=True):
        assert mine.frames == theirs.frames == 9 and bool(theirs.finite)
        kept = [pair for pair in zip(mine.features, theirs.features, strict=True) if pair != (None, None)]
        assert len(kept) > len(mine.features) // 2
        for one, other in kept:
            assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
            torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
            assert other.untyped_storage().nbytes() == other.nbytes, "no memory shared with another stream"


def test_streams_at_unlike_places_are_not_joined() -> None:
    decoder = decoder_of(small_vae())
    begun, fresh = decoder.start(), decoder.start()
    decoder.decode(draw(1, CHANNELS, 3, 4, 6), begun)
    assert not decoder.can_join([begun, fresh]) and decoder.can_join([fresh, decoder.start()])
    assert not decoder_of(small_codec(small_config())).can_join([DecoderState(), DecoderState()])
