"""Fragmented MP4 read by its boxes (ISO/IEC 14496-12): parts of a stream as they come, and where each one stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diagonal.errors import FieldError, require

FREE = b"\x00\x00\x00\x08free"  # an empty box, which players pass over
_HEADER_BYTES = 8
_BASE_DURATION, _DURATION = 0x8, 0x100  # flags of tfhd and trun that say which of their fields are there
_TRUN_FIELDS = (0x100, 0x200, 0x400, 0x800)  # of each sample: duration, size, flags, composition offset


@dataclass(frozen=True)
class Fragment:
    """One `moof`: its sequence number, when its first frame is decoded, its frames, and how long they last."""

    sequence: int
    start_ticks: int
    frames: int
    duration_ticks: int

    @property
    def end_ticks(self) -> int:
        return self.start_ticks + self.duration_ticks


def boxes(data: bytes | bytearray, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and end of each MP4 box between two offsets."""
    stop = len(data) if stop is None else stop
    while start + _HEADER_BYTES <= stop:
        size = int.from_bytes(data[start : start + 4], "big")
        require(_HEADER_BYTES <= size <= stop - start, "box size", size, f"8 to {stop - start} bytes")
        yield data[start + 4 : start + 8].decode("latin-1"), start, start + size
        start += size


def box_at(data: bytes | bytearray, path: tuple[str, ...]) -> int:
    """Offset of the box at `path`, such as moof, traf, tfdt; `FieldError` when there is none."""
    start, stop = 0, len(data)
    for name in path:
        found = next(((first, last) for kind, first, last in boxes(data, start, stop) if kind == name), None)
        if found is None:
            raise FieldError("fragment", name, f"an MP4 part with {', '.join(path)}")
        start, stop = found[0] + _HEADER_BYTES, found[1]
    return start - _HEADER_BYTES


def timescale(init: bytes) -> int:
    """Ticks a second of an initialisation segment's first track (mdhd, 8.4.2)."""
    header = box_at(init, ("moov", "trak", "mdia", "mdhd"))
    offset = 28 if init[header + 8] == 1 else 20
    return int.from_bytes(init[header + offset : header + offset + 4], "big")


def read_fragment(part: bytes) -> Fragment:
    """Where a `moof` + `mdat` stands in its stream (mfhd, tfhd, tfdt, trun: 8.8.5 to 8.8.8, 8.8.12)."""
    header, time = box_at(part, ("moof", "mfhd")), box_at(part, ("moof", "traf", "tfdt"))
    run = box_at(part, ("moof", "traf", "trun"))
    width = 8 if part[time + 8] == 1 else 4
    frames = int.from_bytes(part[run + 12 : run + 16], "big")
    return Fragment(
        int.from_bytes(part[header + 12 : header + 16], "big"),
        int.from_bytes(part[time + 12 : time + 12 + width], "big"),
        frames,
        _durations(part, run, frames) or frames * _base_duration(part),
    )


def split(data: bytes) -> tuple[bytes, bytes]:
    """The initialisation segment (b'' where there is none) and the media behind it."""
    first = next((start for name, start, _ in boxes(data) if name == "moof"), len(data))
    return data[:first], data[first:]


class PartReader:
    """Cuts a stream of bytes into its parts: the initialisation segment, then each `moof` + `mdat`, whole. What keeps a
    connection busy between them (`FREE`) is left out."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The parts that are whole with these bytes; an initialisation segment once its `moov` is there."""
        self._data += data
        self._drop_free()
        while (size := self._whole_bytes()) > 0:
            yield bytes(self._data[:size])
            del self._data[:size]
            self._drop_free()

    @property
    def rest_bytes(self) -> int:
        """Bytes of a part that is not whole yet."""
        return len(self._data)

    def _drop_free(self) -> None:
        while self._data.startswith(FREE):
            del self._data[: len(FREE)]

    def _whole_bytes(self) -> int:
        """Size of the first part; 0 while it is not all there."""
        start = 0
        while start + _HEADER_BYTES <= len(self._data):
            size = int.from_bytes(self._data[start : start + 4], "big")
            require(size >= _HEADER_BYTES, "box size", size, "at least 8 bytes")
            name = bytes(self._data[start + 4 : start + 8])
            start += size
            if name in (b"moov", b"mdat"):
                return start if start <= len(self._data) else 0
        return 0


def _base_duration(part: bytes) -> int:
    """The duration that tfhd gives to all frames; 0 when it gives none."""
    header = box_at(part, ("moof", "traf", "tfhd"))
    flags = int.from_bytes(part[header + 9 : header + 12], "big")
    if not flags & _BASE_DURATION:
        return 0
    offset = header + 16 + (8 if flags & 0x1 else 0) + (4 if flags & 0x2 else 0)
    return int.from_bytes(part[offset : offset + 4], "big")


def _durations(part: bytes, run: int, frames: int) -> int:
    """The sum of the durations that trun gives to each frame; 0 when it gives none."""
    flags = int.from_bytes(part[run + 9 : run + 12], "big")
    if not flags & _DURATION:
        return 0
    first = run + 16 + (4 if flags & 0x1 else 0) + (4 if flags & 0x4 else 0)
    step = 4 * sum(bool(flags & field) for field in _TRUN_FIELDS)
    return sum(int.from_bytes(part[at : at + 4], "big") for at in range(first, first + frames * step, step))
