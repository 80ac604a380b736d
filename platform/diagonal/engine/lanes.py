"""Lanes: where a batch is decoded and brought over; on a GPU, streams of their own beside the next batch's forwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor

COUNT = 2  # a batch on its way to the host, and the next one
URGENT = -1  # a chunk that is nearly out goes before the forwards of the next: they would hold it up for their length


class Lane:
    """Work that may run beside what the device's current stream does; without a stream of its own, in its turn.

    `before` is the stream of the lane that has the batch before: both may decode for one session, in order.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None, before: torch.cuda.Stream | None = None) -> None:
        self._stream, self._before = stream, before

    @contextmanager
    def after(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Run the block's work behind all that was given to the current stream and to the lane before so far; it reads
        these tensors.

        Their memory is not used anew before the lane is done, also when they are let go while it reads.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        if self._before is not None:
            self._stream.wait_stream(self._before)
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                tensor.record_stream(self._stream)
            yield

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run the block's work behind the lane's own: a copy to the host waits for that alone, and for nothing that
        the current stream was given since."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield


def lanes(device: torch.device, beside: bool) -> Iterator[Lane]:
    """A lane for each batch, by turns; `beside` the current stream where the device has streams."""
    if not beside or device.type != "cuda":
        return cycle([Lane()])
    streams = [torch.cuda.Stream(device, priority=URGENT) for _ in range(COUNT)]
    return cycle([Lane(stream, before) for stream, before in zip(streams, [streams[-1], *streams], strict=False)])
