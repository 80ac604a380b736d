"""Fragmented MP4 read by its boxes, as our own encoder and FFmpeg's muxer write it."""

from __future__ import annotations

import pytest

from diagonal.errors import FieldError
from diagonal.mp4 import Fragment, PartReader, box_at, read_fragment, split, timescale

FPS = 16


def test_a_fragment_says_where_it_stands(parts: list[bytes]) -> None:
    ticks = timescale(parts[0]) // FPS
    assert timescale(parts[0]) % FPS == 0
    assert read_fragment(parts[1]) == Fragment(1, 0, 9, 9 * ticks)
    assert read_fragment(parts[2]) == Fragment(2, 9 * ticks, 12, 12 * ticks)
    assert read_fragment(parts[1]).end_ticks == read_fragment(parts[2]).start_ticks


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_a_stream_cut_anywhere_is_read_as_its_parts(parts: list[bytes], size: int) -> None:
    stream, reader = b"".join(parts), PartReader()
    pieces = (stream[start : start + size] for start in range(0, len(stream), size))
    assert [part for piece in pieces for part in reader.feed(piece)] == parts
    assert reader.rest_bytes == 0


def test_half_a_part_is_kept_back(parts: list[bytes]) -> None:
    reader = PartReader()
    assert list(reader.feed(parts[0] + parts[1][:-1])) == [parts[0]] and reader.rest_bytes == len(parts[1]) - 1


def test_an_initialisation_segment_is_told_from_the_media_behind_it(parts: list[bytes]) -> None:
    assert split(parts[0] + parts[1]) == (parts[0], parts[1])
    assert split(parts[2]) == (b"", parts[2])


def test_what_is_no_mp4_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(FieldError, match="box size"):
        list(PartReader().feed(b"\0\0\0\1ftyp...."))
    with pytest.raises(FieldError, match="moof"):
        box_at(parts[0], ("moof", "mfhd"))
