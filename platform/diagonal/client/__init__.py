"""Python client and command line; imports neither torch nor Ray."""

from diagonal.client.client import DiagonalClient, DiagonalError, Video

__all__ = ["DiagonalClient", "DiagonalError", "Video"]
