"""The watermark: it is read after encoding and scaling, by its key alone, and how sure that is can be trusted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from diagonal.errors import FieldError
from diagonal.media.encode import ChunkEncoder, Pixels, read_mp4, write_mp4
from diagonal.media.watermark import AMPLITUDE, Detection, SpreadSpectrum, accident_rate_of, main, payload_of, room

KEY, OTHER_KEY, VIDEO = b"a key of sixteen bytes and more", b"another key of sixteen bytes", "video_1"
PAYLOAD = payload_of(VIDEO)
HEIGHT, WIDTH = 480, 832


def shapes(frames: int, height: int, width: int) -> Pixels:
    """A disc that moves over a slope of colour, before a saturated square."""
    rows, columns = np.mgrid[0:height, 0:width]
    images = np.empty((frames, height, width, 3), np.uint8)
    for index, image in enumerate(images):
        image[:] = (np.array([0.7, 0.6, 0.2]) * (150 + 60 * rows / height)[..., np.newaxis]).astype(np.uint8)
        image[(abs(columns - 0.8 * width) < 0.1 * width) & (abs(rows - 0.3 * height) < 0.1 * height)] = (0, 30, 255)
        middle = width * (0.2 + 0.4 * index / frames)
        image[(columns - middle) ** 2 + (rows - height / 2) ** 2 < (height / 5) ** 2] = (220, 20, 20)
    return images


def texture(frames: int, height: int, width: int) -> Pixels:
    """Noise of equal energy in each octave, as in nature and much harder, that moves by two pixels a frame."""
    wide = width + 2 * frames
    spectrum = np.fft.rfft2(np.random.default_rng(5).standard_normal((height, wide)))
    rows, columns = np.fft.fftfreq(height)[:, np.newaxis], np.fft.rfftfreq(wide)[np.newaxis]
    field = np.fft.irfft2(spectrum / np.maximum(1 / wide, np.hypot(rows, columns)), s=(height, wide))
    grey = np.clip(field / field.std() * 45 + 120, 0, 255).astype(np.uint8)
    return np.stack([grey[:, 2 * at : 2 * at + width, np.newaxis].repeat(3, axis=2) for at in range(frames)])


def encoded(pixels: Pixels, crf: int, height: int = 0, width: int = 0) -> Pixels:
    """Through x264 and back, by way of another size where one is given."""
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as target:
        options = {"preset": "veryfast", "tune": "zerolatency", "crf": str(crf)}
        stream: Any = target.add_stream("libx264", rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = width or pixels.shape[2], height or pixels.shape[1], "yuv420p"
        frames = (av.VideoFrame.from_ndarray(image, format="rgb24") for image in pixels)
        for frame in frames:
            target.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")))
        target.mux(stream.encode())
    full = {"width": pixels.shape[2], "height": pixels.shape[1], "format": "rgb24", "interpolation": "BICUBIC"}
    with av.open(io.BytesIO(data.getvalue()), "r") as source:
        return np.stack([frame.reformat(**full).to_ndarray() for frame in source.decode(video=0)])


def right(found: Detection) -> float:
    return float(np.mean(np.array(found.bits) == np.array(PAYLOAD[: len(found.bits)])))


@pytest.fixture(scope="module")
def mark() -> SpreadSpectrum:
    return SpreadSpectrum(HEIGHT, WIDTH, KEY, PAYLOAD)


@pytest.fixture(scope="module")
def clip() -> Pixels:
    return shapes(6, HEIGHT, WIDTH)


def test_it_cannot_be_seen(mark: SpreadSpectrum, clip: Pixels) -> None:
    before = clip.copy()
    marked = mark.embed(clip, 0)
    difference = marked.astype(int) - clip
    assert (clip == before).all() and np.abs(difference).max() == AMPLITUDE
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 41.5
    assert (difference[:, 8:16, 8:16] == difference[0, 8, 8]).all()  # a cell is raised or lowered as a whole


@pytest.mark.parametrize("crf", [18, 23, 28])
def test_every_bit_survives_encoding(mark: SpreadSpectrum, clip: Pixels, crf: int) -> None:
    found = mark.detect(encoded(mark.embed(clip, 0), crf))
    assert found.found and right(found) == 1.0 and found.confidence > 0.999 and len(found.bits) == 64


def test_every_bit_survives_another_size_and_back(mark: SpreadSpectrum, clip: Pixels) -> None:
    found = mark.detect(encoded(mark.embed(clip, 0), 23, 368, 640))
    assert found.found and right(found) == 1.0


def test_in_heavy_texture_it_takes_more_frames_and_the_confidence_says_so(mark: SpreadSpectrum) -> None:
    marked = mark.embed(texture(24, HEIGHT, WIDTH), 0)
    few, many = (mark.detect(encoded(marked[:frames], 23)) for frames in (6, 24))
    assert many.found and right(many) > 0.95 and right(few) < right(many)
    assert few.confidence < many.confidence and abs(many.confidence - right(many)) < 0.1


def test_without_its_key_there_is_nothing_to_find(mark: SpreadSpectrum, clip: Pixels) -> None:
    received = encoded(mark.embed(clip, 0), 23)
    other = SpreadSpectrum(HEIGHT, WIDTH, OTHER_KEY).detect(received)
    assert not other.found and 0.2 < right(other) < 0.8
    assert not mark.detect(encoded(clip, 23)).found


@pytest.mark.slow
@pytest.mark.parametrize("content", [shapes, texture])
def test_wrong_keys_find_something_as_rarely_as_they_say(content: Any) -> None:
    """In marked video, too: rates of accident are uniform, so a bound of 1e-6 is passed once in a million keys."""
    size, keys = 256, 1000
    marked = SpreadSpectrum(size, size, KEY, PAYLOAD).embed(content(2, size, size), 0)
    judged = (SpreadSpectrum(size, size, number.to_bytes(16, "big")).detect(marked) for number in range(keys))
    rates = np.array([found.accident_rate for found in judged])
    for bound in (0.5, 0.1, 0.01):
        expected = keys * bound
        assert (rates < bound).sum() <= expected + 4 * np.sqrt(expected), bound
    assert (rates < 0.5).mean() > 0.4 and rates.min() > 1e-5


def test_the_payload_shrinks_with_the_picture_until_there_is_no_room() -> None:
    assert [room(480, 832), room(448, 448), room(320, 320), room(256, 256)] == [64, 64, 32, 16]
    with pytest.raises(FieldError, match="size = '32x32'"):
        SpreadSpectrum(32, 32, KEY, PAYLOAD)
    with pytest.raises(FieldError, match="scale"):
        SpreadSpectrum(32, 32, KEY, PAYLOAD, scale=3)
    with pytest.raises(FieldError, match="watermark_key"):
        SpreadSpectrum(HEIGHT, WIDTH, b"short", PAYLOAD)
    with pytest.raises(FieldError, match="payload"):
        SpreadSpectrum(HEIGHT, WIDTH, KEY, PAYLOAD[:32])


def squares(pixels: Pixels) -> Pixels:
    """Each pixel as a square of eight."""
    return pixels.repeat(8, axis=-3).repeat(8, axis=-2)


def test_small_frames_that_are_enlarged_carry_the_mark_of_what_is_shown(tmp_path: Path) -> None:
    """The embedded world: 32x32 pixels, each shown as a square of eight."""
    small = shapes(21, 32, 32)
    marked = SpreadSpectrum(32, 32, KEY, PAYLOAD, scale=8).embed(small, 0)
    shown = SpreadSpectrum(256, 256, KEY, PAYLOAD)
    assert (squares(marked) == shown.embed(squares(small), 0)).all()
    encoder = ChunkEncoder(32, 32, 16, scale=8)
    stream = encoder.init_segment() + encoder.encode_chunk(marked)
    found = shown.detect(read_mp4(stream))
    assert found.found and right(found) == 1.0 and len(found.bits) == 16


def test_the_edges_of_the_range_are_kept() -> None:
    mark = SpreadSpectrum(256, 256, KEY, PAYLOAD)
    extremes = np.stack([np.full((256, 256, 3), value, np.uint8) for value in (0, 255)])
    marked = mark.embed(extremes, 0)
    assert marked[0].max() == AMPLITUDE and marked[1].min() == 255 - AMPLITUDE


def test_how_often_bits_match_by_accident() -> None:
    assert accident_rate_of(0, 16) == 1.0 and accident_rate_of(16, 16) == 2**-16
    assert accident_rate_of(64, 64) == 2**-64


def test_the_command_tells_whose_file_it_is(
    mark: SpreadSpectrum, clip: Pixels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, other, path = tmp_path / "key", tmp_path / "other", tmp_path / "video.mp4"
    key.write_bytes(KEY)
    other.write_bytes(OTHER_KEY)
    write_mp4(path, mark.embed(clip, 0), 16)
    assert main(["detect", str(path), "--key-file", str(key), "--video", VIDEO]) == 0
    told = capsys.readouterr().out
    assert told.startswith("found") and "64 of 64 bits are video_1's" in told
    assert main(["detect", str(path), "--key-file", str(other)]) == 1
    assert capsys.readouterr().out.startswith("not found")
    assert main(["detect", str(tmp_path / "none.mp4"), "--key-file", str(key)]) == 2
