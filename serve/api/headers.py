"""What answers say in their headers: which bytes of a file they hold, and what is left of a key's quotas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from serve.gateway.gateway import Gateway
from serve.records import WINDOW_S, Caller, Usage
from serve.wire.problems import Problem

_ONE_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """The answer to a request for a file: its status, and the bytes from `start` to before `stop` that it holds."""

    status: int
    start: int
    stop: int
    headers: dict[str, str]


def select(request: Request, etag: str, size: int) -> Selection:
    """What a request asks of a file of `size` bytes by Range, If-Range and If-None-Match (RFC 9110).

    `etag` is strong. Several ranges at once are answered by the whole; `Problem` 416 when the range is not in the file.
    """
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    if _names(request.headers.get("if-none-match", ""), etag):
        return Selection(304, 0, 0, headers)
    condition = request.headers.get("if-range")
    asked = _ONE_RANGE.fullmatch(request.headers.get("range", "")) if condition in (None, etag) else None
    first, last = asked.groups() if asked else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return Selection(200, 0, size, headers | {"Content-Length": str(size)})
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= size:
        problem = Problem(416, "range_not_satisfiable", f"the file has {size} bytes", param="Range")
        problem.headers = {"Content-Range": f"bytes */{size}"}
        raise problem
    about = {"Content-Range": f"bytes {start}-{stop - 1}/{size}", "Content-Length": str(stop - start)}
    return Selection(206, start, stop, headers | about)


async def file_answer(request: Request, gateway: Gateway, video_id: str, caller: Caller) -> Response:
    """The caller's finished file as the request asks for it: whole, a range of it, or its headers alone."""
    size = await gateway.content_size(video_id, caller)
    chosen = select(request, f'"{video_id}-{size:x}"', size)
    about = {"Content-Disposition": f'inline; filename="{video_id}.mp4"'} if chosen.status != 304 else {}
    options: dict[str, Any] = {"status_code": chosen.status, "headers": chosen.headers | about}
    if request.method == "HEAD" or chosen.status == 304:
        return Response(**options, media_type="video/mp4")
    parts = gateway.content(video_id, chosen.start, chosen.stop)
    return StreamingResponse(parts, **options, media_type="video/mp4")


def rate_limits(caller: Caller, usage: Usage | None) -> dict[str, str]:
    """`RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10); nothing without usage or limits.

    `frames` are pixel frames in any minute, `sessions` videos at once.
    """
    if usage is None:
        return {}
    policies, left = [], []
    if caller.frames_per_minute:
        policies.append(f'"frames";q={caller.frames_per_minute};w={int(WINDOW_S)}')
        left.append(f'"frames";r={max(0, caller.frames_per_minute - usage.frames)};t={ceil(usage.reset_s)}')
    if caller.sessions:
        policies.append(f'"sessions";q={caller.sessions};qu="concurrent-requests"')
        left.append(f'"sessions";r={max(0, caller.sessions - usage.sessions)}')
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(left)} if policies else {}


def _names(condition: str, etag: str) -> bool:
    """Whether an If-None-Match holds for the file; comparison there is weak."""
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return etag in tags or tags == ["*"]
