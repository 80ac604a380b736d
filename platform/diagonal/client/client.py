"""The Python client: one method a route, typed answers, and errors that carry what the server said.

What a full or restarting server refuses is asked again after the time it names; a video is never made twice by that.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
API_KEY_VARIABLE, URL_VARIABLE = "DIAGONAL_API_KEY", "DIAGONAL_URL"
Pacing = Literal["none", "realtime"]
_TRY_AGAIN = (429, 502, 503, 504)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


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


@dataclass(frozen=True)
class Video:
    """A video as the server describes it; `answer` is everything it said."""

    id: str
    status: str
    progress: int
    frames: int
    frames_done: int
    fps: int
    size: str
    mime: str
    error: str | None
    answer: Mapping[str, Any]

    @property
    def over(self) -> bool:
        return self.status not in ("queued", "in_progress")

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Video:
        error = answer.get("error")
        return cls(
            id=answer["id"],
            status=answer["status"],
            progress=answer["progress"],
            frames=answer["num_frames"],
            frames_done=answer["frames_done"],
            fps=answer["fps"],
            size=answer["size"],
            mime=answer["mime"],
            error=error["message"] if error else None,
            answer=answer,
        )


class DiagonalClient:
    """Speaks to one server. Use it as a context manager, or call `shut`; methods raise `DiagonalError`.

    Without `base_url` and `api_key` the environment's DIAGONAL_URL and DIAGONAL_API_KEY count. What a server refuses
    for now is asked again at most `max_retries` times.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        self._max_retries = max_retries
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> DiagonalClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    def shut(self) -> None:
        """Close the connections; videos go on."""
        self._http.close()

    def create(
        self,
        prompt: str,
        *,
        frames: int | None = None,
        seconds: float | None = None,
        seed: int | None = None,
        size: str | None = None,
        pacing: Pacing = "none",
    ) -> Video:
        """Start a video; what is not given is the server's default. With `realtime` it is drawn as it is watched."""
        fields = {"prompt": prompt, "num_frames": frames, "seconds": seconds, "seed": seed, "size": size}
        body: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        headers = {"Idempotency-Key": os.urandom(16).hex()}  # asked again, it is the same video
        body |= {"extra": {"pacing": pacing}}
        return Video.from_answer(self._call("POST", "/v1/videos", json=body, headers=headers))

    def get(self, video_id: str) -> Video:
        return Video.from_answer(self._call("GET", f"/v1/videos/{video_id}"))

    def list(self, limit: int = 20) -> tuple[Video, ...]:
        """The newest videos first."""
        answer = self._call("GET", "/v1/videos", params={"limit": limit})
        return tuple(Video.from_answer(item) for item in answer["data"])

    def models(self) -> dict[str, Any]:
        """Models with their sizes, rate and limits."""
        return self._call("GET", "/v1/models")

    def wait(
        self,
        video_id: str,
        *,
        timeout_s: float = 600.0,
        poll_s: float = 0.25,
        progress: Callable[[Video], None] | None = None,
    ) -> Video:
        """Ask until the video is over, telling `progress` each time; `DiagonalError` if it failed or took too long."""
        deadline = time.monotonic() + timeout_s
        while True:
            video = self.get(video_id)
            if progress:
                progress(video)
            if video.status == "completed":
                return video
            if video.over:
                raise DiagonalError(video.error or f"the video is {video.status}", status=200, code=video.status)
            if time.monotonic() > deadline:
                raise DiagonalError(f"the video was not ready after {timeout_s:g} s", code="timeout")
            time.sleep(poll_s)

    def content(self, video_id: str) -> bytes:
        """The finished file."""
        return self._send("GET", f"/v1/videos/{video_id}/content").content

    def save(self, video_id: str, path: str | os.PathLike[str]) -> Path:
        """Write the finished file, whole or not at all."""
        return write_whole(path, iter([self.content(video_id)]))

    def stream(self, video_id: str, start_chunk: int = 0) -> Iterator[bytes]:
        """The video's bytes as they are made: fragmented MP4, initialisation segment first."""
        path, params = f"/v1/videos/{video_id}/stream", {"start_chunk": start_chunk}
        try:
            with self._http.stream("GET", path, params=params) as response:
                if response.is_error:
                    response.read()
                _raise_for(response)
                yield from response.iter_raw()
        except httpx.HTTPError as error:
            raise _no_answer(error) from error

    def interact(self, video_id: str, prompt: str, *, event_id: str | None = None, transition_chunks: int = 0) -> str:
        """Change the prompt from the next chunk on; returns the event's id, which `interactions` of the video names."""
        event = {"event_id": event_id or os.urandom(8).hex(), "event": {"prompt": prompt}}
        body = {"interaction": event | {"transition_chunks": transition_chunks}}
        return str(self._call("POST", f"/v1/videos/{video_id}/interactions", json=body)["event_id"])

    def delete(self, video_id: str) -> None:
        """Cancel the video if it is not over, and remove it."""
        self._call("DELETE", f"/v1/videos/{video_id}")

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        answer = self._send(method, path, **arguments).json()
        return dict(answer)

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        for attempt in range(self._max_retries + 1):
            try:
                response = self._http.request(method, path, **arguments)
                _raise_for(response)
                return response
            except httpx.HTTPError as error:
                failure = _no_answer(error)
            except DiagonalError as error:
                failure = error
            wait_s = _wait_s(failure, attempt)
            if attempt == self._max_retries or wait_s is None:
                raise failure
            time.sleep(wait_s)
        raise AssertionError("the loop returns or raises")


def write_whole(path: str | os.PathLike[str], parts: Iterator[bytes]) -> Path:
    """Write `parts` beside the file's final name, then rename; on an error nothing is left."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _no_answer(error: httpx.HTTPError) -> DiagonalError:
    return DiagonalError(f"no whole answer from the server: {error or type(error).__name__}", code="no_answer")


def _wait_s(failure: DiagonalError, attempt: int) -> float | None:
    """How long to wait before asking again; None when asking again is of no use."""
    if failure.status not in (0, *_TRY_AGAIN):
        return None
    backoff_s = _FIRST_WAIT_S * 2**attempt * (0.5 + secrets.randbelow(512) / 1024)
    wait_s = max(backoff_s, failure.retry_after_s or 0.0)
    return wait_s if wait_s <= _LONGEST_WAIT_S else None


def _raise_for(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        problem = response.json()
        detail = problem["error"]
    except (ValueError, KeyError, TypeError):
        problem, detail = {}, {}
    wait = response.headers.get("retry-after", "")
    raise DiagonalError(
        detail.get("message") or f"the server answered {response.status_code}",
        status=response.status_code,
        code=detail.get("code") or "",
        param=detail.get("param"),
        retry_after_s=float(wait) if wait.replace(".", "", 1).isdigit() else None,
        request_id=response.headers.get("x-request-id", ""),
    )
