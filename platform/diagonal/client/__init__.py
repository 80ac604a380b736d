"""Python client and command line; imports neither torch nor Ray."""

from diagonal.client.client import DiagonalClient, Video
from diagonal.client.errors import (
    BrokenStreamError,
    DiagonalError,
    NoAnswerError,
    RefusedError,
    ServerFullError,
    VideoFailedError,
)
from diagonal.client.protocol import Change, Chunk
from diagonal.client.realtime import AsyncRealtime, Realtime

__all__ = [
    "AsyncRealtime",
    "BrokenStreamError",
    "Change",
    "Chunk",
    "DiagonalClient",
    "DiagonalError",
    "NoAnswerError",
    "Realtime",
    "RefusedError",
    "ServerFullError",
    "Video",
    "VideoFailedError",
]
