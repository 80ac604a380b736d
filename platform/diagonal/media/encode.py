"""Fragmented MP4, one throw-away muxer a chunk: nothing is held back, and any encoder can go on with a stream.

An encoder takes one chunk of frames and gives one `moof` + `mdat` at once. The muxer that wrapped it is thrown away,
its sequence number and decode time are then patched to their place in the stream. So two encoders with one set of
options make one stream: the initialisation segment is the same to the byte.

Chroma is subsampled (browsers play nothing else), so a small model's frames are enlarged by whole numbers first:
saturated shapes of 32x32 come back at 22 dB as they are, at 41 dB enlarged eight times.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from diagonal.errors import require
from diagonal.mp4 import box_at, boxes

Pixels = npt.NDArray[np.uint8]
Codec = Literal["h264", "vp9", "av1"]
_TICKS_PER_FRAME = 1000
_BT709 = 1
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class _CodecOptions:
    """What one codec needs to give every frame at once; `name` is the one in a browser's `codecs=` (RFC 6381)."""

    encoder: str
    name: str
    options: dict[str, str]


_CODECS: dict[str, _CodecOptions] = {
    "h264": _CodecOptions(
        "libx264", "avc1", {"preset": "veryfast", "tune": "zerolatency", "profile": "baseline", "crf": "23"}
    ),
    "vp9": _CodecOptions(
        "libvpx-vp9",
        "vp09.00.31.08",
        {"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "lag-in-frames": "0", "crf": "32", "b": "0"},
    ),
    "av1": _CodecOptions(
        "libsvtav1",
        "av01.0.05M.08",
        {"preset": "12", "crf": "35", "svtav1-params": "pred-struct=1:lookahead=0:enable-force-key-frames=1"},
    ),
}
CODECS: tuple[str, ...] = tuple(_CODECS)


class ChunkEncoder:
    """Encodes one stream, a chunk a call; not thread-safe, and chunks must come in order.

    `height`, `width` are the pixels' own; each is enlarged `scale` times (nearest neighbour), and the result must be
    even. Another encoder goes on with a stream when it is given the next `first_pixel_frame` and `sequence`.
    """

    def __init__(
        self,
        height: int,
        width: int,
        fps: int,
        *,
        codec: Codec = "h264",
        scale: int = 1,
        first_pixel_frame: int = 0,
        sequence: int = 1,
        threads: int = 1,
    ) -> None:
        require(codec in _CODECS, "codec", codec, f"one of {list(CODECS)}")
        require(scale >= 1, "scale", scale, "a whole number of at least 1")
        for name, size in (("height", height), ("width", width)):
            require(size > 0 and size * scale % 2 == 0, name, size, f"above 0, and even when enlarged {scale} times")
        require(fps >= 1, "fps", fps, "a whole number of at least 1")
        require(first_pixel_frame >= 0, "first_pixel_frame", first_pixel_frame, "a number of at least 0")
        require(sequence >= 1, "sequence", sequence, "a number of at least 1")
        self.height, self.width, self.fps, self.scale, self.codec = height, width, fps, scale, codec
        self.next_pixel_frame, self.next_sequence = first_pixel_frame, sequence
        self._reformatter = VideoReformatter()  # keeps what it prepared for frames of one size
        self._open(_CODECS[codec], threads)

    @property
    def mime(self) -> str:
        """Content type with the codec string that `MediaSource.addSourceBuffer` wants."""
        name = _CODECS[self.codec].name
        if self.codec == "h264":  # profile, constraints and level follow from the size: bytes 1 to 3 of the avcC record
            init = self.init_segment()
            record = init.index(b"avcC") + 4
            name = f"{name}.{init[record + 1 : record + 4].hex()}"
        return f'video/mp4; codecs="{name}"'

    def init_segment(self) -> bytes:
        """`ftyp` + `moov`: once, before any chunk; the same for every encoder with these options."""
        return _keep(self._muxed([]), ("ftyp", "moov"))

    def encode_chunk(self, pixels: Pixels) -> bytes:
        """One `moof` + `mdat` that starts with a key frame; `pixels` is uint8 `[f, h, w, 3]`, f >= 1."""
        self._check(pixels)
        packets = [packet for index, image in enumerate(pixels) for packet in self._encode(image, index)]
        if len(packets) != len(pixels) or not packets[0].is_keyframe:
            raise RuntimeError(f"{self.codec}: {len(packets)} packets for {len(pixels)} frames, or no key frame first")
        start = self.next_pixel_frame
        for index, packet in enumerate(packets):
            packet.pts = packet.dts = index
            packet.duration, packet.time_base = 1, Fraction(1, self.fps)
        fragment = bytearray(_keep(self._muxed(packets), ("moof", "mdat")))
        _patch(fragment, self.next_sequence, start * _TICKS_PER_FRAME)
        self.next_pixel_frame = start + len(pixels)
        self.next_sequence += 1
        return bytes(fragment)

    def _open(self, codec: _CodecOptions, threads: int) -> None:
        self._sink = av.open(io.BytesIO(), "w", format="mp4", options={"movflags": "empty_moov"})
        stream: Any = self._sink.add_stream(codec.encoder, rate=self.fps, options=dict(codec.options))
        stream.width, stream.height, stream.pix_fmt = self.width * self.scale, self.height * self.scale, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, self.fps)
        context.gop_size = 1 << 20  # key frames stand where chunks start and nowhere else
        context.thread_count = threads
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._sink.start_encoding()  # without it the stream has no extradata, and nothing decodes
        self._stream = stream

    def _check(self, pixels: Pixels) -> None:
        right = pixels.ndim == 4 and len(pixels) >= 1 and pixels.shape[1:] == (self.height, self.width, 3)
        require(right, "pixels.shape", pixels.shape, f"(f >= 1, {self.height}, {self.width}, 3)")
        require(pixels.dtype == np.uint8, "pixels.dtype", str(pixels.dtype), "uint8")

    def _encode(self, image: Pixels, index: int) -> Iterable[Any]:
        frame = self._enlarged_yuv(image)
        frame.pts, frame.time_base = self.next_pixel_frame + index, Fraction(1, self.fps)
        frame.pict_type = PictureType.NONE if index else PictureType.I
        return self._stream.encode(frame)

    def _enlarged_yuv(self, image: Pixels) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        return self._reformatter.reformat(
            frame,
            self.width * self.scale,
            self.height * self.scale,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            # squares of one colour lose nothing to half the colours' resolution; pixels of their own are averaged
            interpolation=Interpolation.POINT if self.scale > 1 else Interpolation.BILINEAR,
        )

    def _muxed(self, packets: list[Any]) -> bytes:
        data = io.BytesIO()
        timescale = str(self.fps * _TICKS_PER_FRAME)
        options = {"movflags": "empty_moov+default_base_moof", "video_track_timescale": timescale}
        with av.open(data, "w", format="mp4", options=options) as muxer:
            stream = muxer.add_stream_from_template(self._stream)
            stream.time_base = Fraction(1, self.fps)
            muxer.start_encoding()
            for packet in packets:
                packet.stream = stream
                muxer.mux(packet)
        return data.getvalue()


def reduce(pixels: Pixels, scale: int) -> Pixels:
    """The mean of each square of `scale` pixels of `[..., h, w, 3]`, rounded: what an encoder enlarged, small again."""
    if scale == 1:
        return pixels
    height, width = pixels.shape[-3], pixels.shape[-2]
    require(height % scale == 0 and width % scale == 0, "scale", scale, f"a divisor of {height} and of {width}")
    squares = pixels.reshape(*pixels.shape[:-3], height // scale, scale, width // scale, scale, 3)
    return np.rint(squares.mean(axis=(-4, -2))).astype(np.uint8)


def watchable_scale(height: int, width: int, least: int = 256) -> int:
    """The whole factor that brings the shorter side to at least `least` pixels: 8 for 32x32, 1 for 832x480."""
    return max(1, ceil(least / min(height, width)))


def encode_video(pixels: Pixels, fps: int, *, codec: Codec = "h264", scale: int = 1) -> bytes:
    """A whole clip uint8 `[f, h, w, 3]` as one fragmented MP4."""
    encoder = ChunkEncoder(pixels.shape[1], pixels.shape[2], fps, codec=codec, scale=scale)
    return encoder.init_segment() + encoder.encode_chunk(pixels)


def write_mp4(path: str | os.PathLike[str], pixels: Pixels, fps: int, *, codec: Codec = "h264", scale: int = 1) -> None:
    """Write a clip uint8 `[f, h, w, 3]` as a plain MP4, whole or not at all."""
    write_fragments(path, [encode_video(pixels, fps, codec=codec, scale=scale)])


def write_fragments(path: str | os.PathLike[str], segments: Iterable[bytes]) -> None:
    """Write a fragmented stream (initialisation segment first) as a plain MP4 that players can seek in.

    Nothing is re-encoded; the index stands in front. The file is there whole or not at all.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        _remux(b"".join(segments), temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _remux(fragmented: bytes, path: Path) -> None:
    with av.open(io.BytesIO(fragmented), mode="r") as source:
        video = source.streams.video[0]
        options = {"movflags": "faststart", "video_track_timescale": str(1 / Fraction(video.time_base or 1))}
        with av.open(str(path), "w", format="mp4", options=options) as target:
            stream = target.add_stream_from_template(video, opaque=True)
            for packet in source.demux(video):
                if packet.dts is not None:  # the demuxer's end mark has none
                    packet.stream = stream
                    target.mux(packet)


def read_mp4(source: str | os.PathLike[str] | bytes, scale: int = 1) -> Pixels:
    """Decode a whole file to uint8 `[f, h, w, 3]`, each square of `scale` pixels made one again."""
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    with av.open(file) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return reduce(np.stack(images), scale)


def _keep(data: bytes, names: tuple[str, ...]) -> bytes:
    return b"".join(data[start:stop] for name, start, stop in boxes(data) if name in names)


def _patch(fragment: bytearray, sequence: int, decode_time: int) -> None:
    """Set the sequence number (mfhd) and the decode time of the first frame (tfdt), ISO/IEC 14496-12 8.8.5, 8.8.12."""
    header = box_at(fragment, ("moof", "mfhd"))
    fragment[header + 12 : header + 16] = sequence.to_bytes(4, "big")
    time = box_at(fragment, ("moof", "traf", "tfdt"))
    width = 8 if fragment[time + 8] == 1 else 4
    fragment[time + 12 : time + 12 + width] = decode_time.to_bytes(width, "big")
