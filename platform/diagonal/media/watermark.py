"""An invisible watermark: a keyed spread-spectrum pattern in the luma, with a detector that knows how sure it is.

The picture is divided into square cells. The key gives each cell a payload bit and a sign; embedding raises or lowers
the cell by `AMPLITUDE` levels. The detector takes what a cell differs from its neighbours by, and correlates that with
the signs: without the mark the sums are as random as the key is, whatever the picture shows. So its false-positive rate
is known: it does not depend on the content.

It is made to survive encoding and scaling, not somebody who wants to remove it: averaging many marked frames shows the
pattern, cropping and rotating break it, and blurring it away costs little. It says nothing of unmarked video.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from diagonal.errors import FieldError, require
from diagonal.media.encode import Pixels, read_mp4

CELL = 8  # pixels of the encoded picture: as large as the transforms of the codecs
AMPLITUDE = 2  # levels of 255; PSNR 42 dB
PAYLOAD_BITS = (64, 32, 16)
CELLS_PER_BIT = 48  # fewer, and a bit does not survive ordinary encoding
CERTAIN = 1e-6  # a rarer accident counts as the mark
_LEAST_KEY_BYTES = 16
_BOUND = 2 * AMPLITUDE  # what a cell differs by more than this is the picture's own
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """What a detector found. `bits` is its best guess in any case.

    `accident_rate` is how often video without this key's mark gives as strong a sum; `confidence` the probability that
    a bit is right, averaged, if the mark is there.
    """

    bits: tuple[int, ...]
    confidence: float
    accident_rate: float

    @property
    def found(self) -> bool:
        return self.accident_rate < CERTAIN


class Watermark(Protocol):
    """Of one stream. Frames are `[f, h, w, 3]` uint8, before they are encoded; safe to call from one thread at once."""

    def embed(self, pixels: Pixels, first_pixel_frame: int) -> Pixels:
        """The frames with the mark, as a new array; `first_pixel_frame` is their place in the stream."""
        ...

    def detect(self, pixels: Pixels) -> Detection:
        """What is to be read in these frames."""
        ...


class SpreadSpectrum:
    """For frames of one size, each of whose pixels is encoded as a square of `scale`. `payload` is cut to its room."""

    def __init__(self, height: int, width: int, key: bytes, payload: Sequence[int] = (), scale: int = 1) -> None:
        """`FieldError` when the picture is too small for the shortest payload, or the key too short."""
        require(len(key) >= _LEAST_KEY_BYTES, "watermark_key", f"{len(key)} bytes", f"at least {_LEAST_KEY_BYTES}")
        require(scale >= 1 and CELL % scale == 0, "scale", scale, f"a divisor of {CELL}, with a watermark")
        self._cell = CELL // scale
        self._rows, self._columns = height // self._cell, width // self._cell
        self.payload_bits = room(height * scale, width * scale)
        self._bit_of, self._sign = _secrets(key, self._rows * self._columns, self.payload_bits)
        self._raise: Pixels | None = None
        self._lower: Pixels | None = None
        if payload:
            self._raise, self._lower = self._masks(height, width, payload)

    def embed(self, pixels: Pixels, first_pixel_frame: int) -> Pixels:
        """Raise and lower the cells, within 0 to 255. The pattern is the same in every frame."""
        if self._raise is None or self._lower is None:
            raise FieldError("payload", (), f"{self.payload_bits} bits")
        marked = np.minimum(pixels, 255 - self._raise)
        marked += self._raise
        np.maximum(marked, self._lower, out=marked)
        marked -= self._lower
        return marked

    def detect(self, pixels: Pixels) -> Detection:
        """Frames of the size that was given; more of them, and the bits are surer."""
        luma = np.mean([frame @ np.array([0.2126, 0.7152, 0.0722]) for frame in pixels], axis=0)
        high, wide = self._rows * self._cell, self._columns * self._cell
        squares = luma[:high, :wide].reshape(self._rows, self._cell, self._columns, self._cell)
        differs = np.clip(_from_neighbours(squares.mean(axis=(1, 3))), -_BOUND, _BOUND).ravel()
        size = self.payload_bits
        sums = np.bincount(self._bit_of, self._sign * differs, size)
        spread = np.sqrt(np.bincount(self._bit_of, differs**2, size))
        return _judged(np.divide(sums, spread, out=np.zeros(size), where=spread > 0))

    def _masks(self, height: int, width: int, payload: Sequence[int]) -> tuple[Pixels, Pixels]:
        """What to add and what to take away, uint8 `[h, w, 3]`: of each cell one of the two, of the rest none."""
        size = self.payload_bits
        require(
            len(payload) >= size and set(payload) <= {0, 1},
            "payload",
            f"{len(payload)} values",
            f"at least {size} of 0 and 1",
        )
        bits = 2 * np.asarray(payload[:size]) - 1
        signs = (self._sign * bits[self._bit_of]).reshape(self._rows, self._columns)
        cells = signs.repeat(self._cell, axis=0).repeat(self._cell, axis=1)
        pattern = np.zeros((height, width, 3), np.int64)
        pattern[: cells.shape[0], : cells.shape[1]] = cells[..., np.newaxis]
        return (AMPLITUDE * (pattern > 0)).astype(np.uint8), (AMPLITUDE * (pattern < 0)).astype(np.uint8)


def room(height: int, width: int) -> int:
    """Payload bits that a picture of that size, as encoded, has room for; `FieldError` when it has for none."""
    cells = (height // CELL) * (width // CELL)
    fitting = [bits for bits in PAYLOAD_BITS if bits * CELLS_PER_BIT <= cells]
    least = PAYLOAD_BITS[-1] * CELLS_PER_BIT
    require(bool(fitting), "size", f"{width}x{height}", f"with a watermark, at least {least} cells of {CELL}x{CELL}")
    return fitting[0]


def payload_of(name: str) -> tuple[int, ...]:
    """64 bits that stand for a name, such as a video's id: the first of its SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()[: max(PAYLOAD_BITS) // 8]
    return tuple(byte >> shift & 1 for byte in digest for shift in range(7, -1, -1))


def accident_rate_of(matching: int, bits: int) -> float:
    """How often so many of `bits` bits, or more, match a payload by accident."""
    return sum(math.comb(bits, count) for count in range(matching, bits + 1)) / 2**bits


def _secrets(key: bytes, cells: int, bits: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each cell's bit, the bits having equally many cells but for one, and its sign; the same on every machine."""
    stream = hashlib.shake_256(b"diagonal-watermark-1" + key + cells.to_bytes(4, "big") + bytes([bits]))
    drawn = np.frombuffer(stream.digest(8 * cells), dtype=">u8")
    order = np.argsort(drawn, kind="stable").argsort(kind="stable")
    return order % bits, 2 * (drawn & np.uint64(1)).astype(np.int64) - 1


def _from_neighbours(cells: Floats) -> Floats:
    """What each cell of `[rows, columns]` differs by from the mean of its up to eight neighbours."""
    padded, there = np.pad(cells, 1), np.pad(np.ones_like(cells), 1)

    def around(values: Floats) -> Floats:
        rows = values[:-2] + values[1:-1] + values[2:]
        return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]

    return cells - (around(padded) - cells) / (around(there) - 1)


def _judged(scores: Floats) -> Detection:
    """From one score a bit, standard normal when there is no mark, around plus or minus one mean when there is."""
    strength = math.sqrt(max(0.0, float(np.mean(scores**2)) - 1))
    sure = 1 / (1 + np.exp(-2 * strength * np.abs(scores)))
    bits = tuple(int(score > 0) for score in scores)
    return Detection(bits, float(sure.mean()), _chi_squared_tail(float(np.sum(scores**2)), len(scores)))


def _chi_squared_tail(value: float, freedom: int) -> float:
    """How often the squares of `freedom` (even) standard normal numbers sum to `value` or more."""
    half = value / 2
    logs = [term * math.log(half) - math.lgamma(term + 1) - half for term in range(freedom // 2)] if half > 0 else [0.0]
    return min(1.0, sum(math.exp(log) for log in logs))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m diagonal.media.watermark detect FILE --key-file KEY`: 0 when the key's mark is in, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m diagonal.media.watermark", description="Look for a watermark.")
    commands = parser.add_subparsers(required=True, metavar="command")
    look = commands.add_parser("detect", help="whether a file carries the mark of a key")
    look.add_argument("file", help="a video, of the size in which it was made")
    look.add_argument("--key-file", required=True, help="as the service's watermark_key")
    look.add_argument("--video", help="compare with the payload of this video id")
    options = parser.parse_args(arguments)
    try:
        pixels = read_mp4(options.file)
        found = SpreadSpectrum(pixels.shape[1], pixels.shape[2], Path(options.key_file).read_bytes()).detect(pixels)
    except (OSError, ValueError) as error:
        print(f"watermark: {error}", file=sys.stderr)
        return 2
    print(f"{'found' if found.found else 'not found'}: by accident at a rate of {found.accident_rate:.1e}")
    print(f"payload {''.join(map(str, found.bits))}, each bit right with probability {found.confidence:.3f}")
    if options.video:
        size = len(found.bits)
        same = sum(mine == theirs for mine, theirs in zip(found.bits, payload_of(options.video), strict=False))
        rate = accident_rate_of(same, size)
        print(f"{same} of {size} bits are {options.video}'s: by accident at a rate of {rate:.1e}")
    return 0 if found.found else 1


if __name__ == "__main__":
    sys.exit(main())
