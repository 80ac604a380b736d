"""What can go wrong, as the server told it: a code for programs, the field, when to ask again, which request it was."""

from __future__ import annotations


class DiagonalError(Exception):
    """An error answer, or none at all: `status` is the HTTP status, 0 when no answer came."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s
        self.request_id = request_id


class RefusedError(DiagonalError):
    """What was asked for is wrong, not allowed, or not there: asking again is of no use."""


class ServerFullError(DiagonalError):
    """There is no room now, or the key's share is used up: `retry_after_s` says when to ask again."""


class NoAnswerError(DiagonalError):
    """The server did not answer, or broke down."""


class VideoFailedError(DiagonalError):
    """The video ended before its last chunk."""


class BrokenStreamError(DiagonalError):
    """A chunk is missing, came twice, or is not what its hash says."""


def error_for(message: str, status: int, **about: object) -> DiagonalError:
    """The error of an HTTP status."""
    kind = ServerFullError if status == 429 else RefusedError if 400 <= status < 500 else NoAnswerError
    return kind(message, status=status, **about)  # type: ignore[arg-type]
