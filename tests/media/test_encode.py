"""Chunks leave the encoder at once, and together make one exact stream, whoever encoded them."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from diagonal.errors import FieldError
from diagonal.media.encode import (
    CODECS,
    ChunkEncoder,
    Pixels,
    boxes,
    encode_video,
    read_mp4,
    reduce,
    watchable_scale,
    write_fragments,
    write_mp4,
)

FPS = 16
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))


def shapes(frames: int, size: int = 32) -> Pixels:
    """Small saturated squares that move: the hardest case for subsampled chroma."""
    video = np.full((frames, size, size, 3), (20, 20, 30), np.uint8)
    for index, image in enumerate(video):
        for number, colour in enumerate(COLOURS):
            left, top = (3 + index + 7 * number) % (size - 6), (2 + 5 * number) % (size - 6)
            image[top : top + 6, left : left + 6] = colour
    return video


def psnr(first: Pixels, second: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2)))


def frame_times(stream: bytes) -> list[float]:
    with av.open(io.BytesIO(stream), mode="r") as container:
        return [float(frame.time or 0) * FPS for frame in container.decode(video=0)]


def probe(ffprobe: str, path: Path) -> dict[str, str]:
    command = [ffprobe, "-v", "error", "-count_frames", "-show_entries"]
    command += ["stream=nb_frames,nb_read_frames,r_frame_rate,avg_frame_rate,duration", "-of", "json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return dict(json.loads(done.stdout)["streams"][0])


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_is_one_fragment_and_nothing_is_held_back(codec) -> None:  # type: ignore[no-untyped-def]
    encoder, video = ChunkEncoder(32, 32, FPS, codec=codec, scale=2), shapes(21)
    assert [name for name, _, _ in boxes(encoder.init_segment())] == ["ftyp", "moov"]
    stream = encoder.init_segment()
    for start, stop in ((0, 9), (9, 21)):
        fragment = encoder.encode_chunk(video[start:stop])
        assert [name for name, _, _ in boxes(fragment)] == ["moof", "mdat"]
        stream += fragment
        assert frame_times(stream) == list(range(stop))


@pytest.mark.parametrize("codec", CODECS)
def test_another_encoder_goes_on_with_the_stream(codec) -> None:  # type: ignore[no-untyped-def]
    video = shapes(33)
    first = ChunkEncoder(32, 32, FPS, codec=codec, scale=2)
    stream = first.init_segment() + first.encode_chunk(video[:9]) + first.encode_chunk(video[9:21])
    second = ChunkEncoder(32, 32, FPS, codec=codec, scale=2, first_pixel_frame=21, sequence=3)
    assert second.init_segment() == first.init_segment()
    stream += second.encode_chunk(video[21:])
    assert frame_times(stream) == list(range(33))
    assert psnr(read_mp4(stream, 2)[21:], video[21:]) > 25


def test_a_chunk_starts_with_a_key_frame_and_has_no_other() -> None:
    encoder, video = ChunkEncoder(32, 32, FPS, scale=2), shapes(21)
    stream = encoder.init_segment() + encoder.encode_chunk(video[:9]) + encoder.encode_chunk(video[9:])
    with av.open(io.BytesIO(stream), mode="r") as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert [index for index, key in enumerate(keys) if key] == [0, 9]


def test_sequence_and_decode_time_are_those_of_the_place_in_the_stream() -> None:
    fragment = ChunkEncoder(32, 32, FPS, first_pixel_frame=69, sequence=7).encode_chunk(shapes(12))
    header, time = fragment.index(b"mfhd") + 8, fragment.index(b"tfdt") + 8
    assert int.from_bytes(fragment[header : header + 4], "big") == 7
    assert int.from_bytes(fragment[time : time + 8], "big") == 69 * 1000


@pytest.mark.parametrize("frames", [1, 2, 81])
def test_a_written_file_has_exactly_its_frames_at_its_rate(tmp_path: Path, frames: int, ffprobe: str) -> None:
    write_mp4(tmp_path / "clip.mp4", shapes(frames), FPS, scale=8)
    found = probe(ffprobe, tmp_path / "clip.mp4")
    assert (found["nb_frames"], found["nb_read_frames"]) == (str(frames), str(frames))
    assert found["r_frame_rate"] == "16/1" and float(found["duration"]) == pytest.approx(frames / FPS)
    assert read_mp4(tmp_path / "clip.mp4", 8).shape == (frames, 32, 32, 3)


def test_a_stream_of_chunks_becomes_one_plain_file(tmp_path: Path, ffprobe: str) -> None:
    encoder, video = ChunkEncoder(32, 32, FPS, scale=8), shapes(33)
    segments = [encoder.init_segment(), *(encoder.encode_chunk(video[a:b]) for a, b in ((0, 9), (9, 21), (21, 33)))]
    write_fragments(tmp_path / "clip.mp4", segments)
    assert [name for name, _, _ in boxes((tmp_path / "clip.mp4").read_bytes())][:2] == ["ftyp", "moov"]
    assert probe(ffprobe, tmp_path / "clip.mp4")["nb_frames"] == "33"
    np.testing.assert_array_equal(read_mp4(tmp_path / "clip.mp4"), read_mp4(b"".join(segments)))


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(av.error.FFmpegError):
        write_fragments(tmp_path / "clip.mp4", [b"not a video"])
    assert list(tmp_path.iterdir()) == []


def test_a_small_video_keeps_its_colours_when_enlarged_and_loses_them_when_not() -> None:
    video = shapes(21)
    assert psnr(read_mp4(encode_video(video, FPS, scale=8), 8), video) > 36
    assert psnr(read_mp4(encode_video(video, FPS)), video) < 25  # why serving enlarges


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_an_enlarged_pixel_is_a_square_of_one_colour(scale: int) -> None:
    edges = np.zeros((1, 16, 16, 3), np.uint8)
    edges[:, :, 8:] = (255, 255, 255)
    shown = read_mp4(encode_video(edges, FPS, scale=scale)).astype(int)[0]
    assert shown.shape == (16 * scale, 16 * scale, 3)
    assert shown[:, : 8 * scale].max() < 40 and shown[:, 8 * scale :].min() > 215, "nothing is smeared over an edge"


def test_reduce_makes_squares_of_one_colour_single_pixels_again() -> None:
    video = shapes(3)
    np.testing.assert_array_equal(reduce(video.repeat(8, axis=1).repeat(8, axis=2), 8), video)
    with pytest.raises(FieldError, match="scale"):
        reduce(video, 5)


def test_the_scale_brings_the_shorter_side_to_256_and_leaves_large_video_alone() -> None:
    assert [watchable_scale(*size) for size in ((32, 32), (64, 64), (48, 32), (480, 832))] == [8, 4, 8, 1]


def test_the_content_type_names_the_codec_as_browsers_do() -> None:
    assert ChunkEncoder(32, 32, FPS, scale=8).mime.startswith('video/mp4; codecs="avc1.42c0')
    assert 'codecs="vp09.' in ChunkEncoder(32, 32, FPS, codec="vp9").mime


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"height": 33}, "height"),
        ({"width": 0}, "width"),
        ({"fps": 0}, "fps"),
        ({"scale": 0}, "scale"),
        ({"codec": "mpeg2"}, "codec"),
        ({"first_pixel_frame": -1}, "first_pixel_frame"),
        ({"sequence": 0}, "sequence"),
    ],
)
def test_a_wrong_option_is_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        ChunkEncoder(**{"height": 32, "width": 32, "fps": FPS, **arguments})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_pixels_of_another_shape_or_type_are_refused() -> None:
    encoder = ChunkEncoder(32, 32, FPS)
    for wrong in (shapes(3, 16), np.zeros((0, 32, 32, 3), np.uint8), shapes(3)[0]):
        with pytest.raises(FieldError, match="pixels.shape"):
            encoder.encode_chunk(wrong)
    with pytest.raises(FieldError, match="pixels.dtype"):
        encoder.encode_chunk(shapes(3).astype(np.float32))
