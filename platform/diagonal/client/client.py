"""The Python client: one method a route, typed answers, and errors that carry what the server said.

What a full or restarting server refuses is asked again after the time it names; a video is never made twice by that.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

import httpx2

from diagonal.cli import API_KEY_VARIABLE, DEFAULT_URL, URL_VARIABLE
from diagonal.client.connection import environment_error, is_this_machine
from diagonal.client.errors import BrokenStreamError, DiagonalError, NoAnswerError, VideoFailedError, error_for
from diagonal.client.files import write_whole
from diagonal.client.protocol import Pacing, Wish, start_fields
from diagonal.client.realtime import Realtime
from diagonal.mp4 import PartReader, split

LOCAL_KEY_FILE = ".diagonal/serve/local_key"
_PARTIAL = 206
_TRY_AGAIN = (429, 502, 503, 504)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


@dataclass(frozen=True)
class Video:
    """A video as the server describes it; `frames` is None where it has no end; `answer` is everything it said."""

    id: str
    status: str
    progress: int
    frames: int | None
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


def local_key(url: str) -> str | None:
    """The key of a service on this machine that was started in this folder or one above; None for any other server."""
    if not is_this_machine(url):
        return None
    for folder in (Path.cwd(), *Path.cwd().parents):
        with contextlib.suppress(OSError):
            return (folder / LOCAL_KEY_FILE).read_text().strip()
    return None


class DiagonalClient:
    """Speaks to one server. Use it as a context manager, or call `shut`; methods raise `DiagonalError`.

    Without `base_url` and `api_key` the environment's DIAGONAL_URL and DIAGONAL_API_KEY count, and for a server on this
    machine the key in `.diagonal/serve/local_key`, here or in a folder above (`local_key`). What a server refuses
    for now is asked again at most `max_retries` times.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        address = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        key = api_key or os.environ.get(API_KEY_VARIABLE) or local_key(address)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._max_retries, self._timeout_s = max_retries, timeout_s
        options: dict[str, Any] = {"headers": headers, "timeout": timeout_s, "transport": transport}
        try:
            self._http = httpx2.Client(base_url=address, trust_env=not is_this_machine(address), **options)
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise environment_error(error) from error

    def __enter__(self) -> DiagonalClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    @property
    def url(self) -> str:
        """The server's address, with a slash at its end."""
        return str(self._http.base_url).rstrip("/") + "/"

    def shut(self) -> None:
        """Close the connections; videos go on."""
        self._http.close()

    def create(
        self, prompt: str, *, pacing: Pacing = "none", idempotency_key: str | None = None, **wish: Unpack[Wish]
    ) -> Video:
        """Start a video as `Wish` says; with pacing `realtime` it is drawn as it is watched.

        The same `idempotency_key` again gives the same video; without one, only this call's own retries share it.
        """
        body = start_fields(prompt, pacing="realtime" if wish.get("endless") else pacing, **wish)
        headers = {"Idempotency-Key": idempotency_key or os.urandom(16).hex()}  # asked again, it is the same video
        return Video.from_answer(self._call("POST", "/v1/videos", json=body, headers=headers))

    def get(self, video_id: str) -> Video:
        return Video.from_answer(self._call("GET", f"/v1/videos/{video_id}"))

    def list(self, limit: int = 20) -> tuple[Video, ...]:
        """The newest videos first."""
        answer = self._call("GET", "/v1/videos", params={"limit": limit})
        return tuple(Video.from_answer(item) for item in answer["data"])

    def chain(self, video_id: str) -> dict[str, Any]:
        """The signed chain of a stream's chunks, whole, as `diagonal.client.verify` reads it."""
        path = f"/v1/videos/{video_id}/chain"
        links: list[dict[str, Any]] = []
        while True:
            start_chunk = links[-1]["chunk"] + 1 if links else 0
            answer = self._call("GET", path, params={"start_chunk": start_chunk})
            links += answer["links"]
            if not answer["has_more"]:
                return answer | {"links": links}

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
                raise _failed(video)
            if time.monotonic() > deadline:
                raise VideoFailedError(f"the video was not ready after {timeout_s:g} s", code="timeout")
            time.sleep(poll_s)

    def content(self, video_id: str) -> bytes:
        """The finished file."""
        return b"".join(self._file(video_id))

    def save(self, video_id: str, path: str | os.PathLike[str]) -> Path:
        """Write the finished file, whole or not at all."""
        return write_whole(path, self._file(video_id))

    def _file(self, video_id: str) -> Iterator[bytes]:
        """The finished file in parts; where a connection breaks, the next one continues behind what came."""
        done, tag, attempt = 0, "", 0
        while True:
            headers = {"Range": f"bytes={done}-", "If-Range": tag} if done else {}
            try:
                with self._http.stream("GET", f"/v1/videos/{video_id}/content", headers=headers) as response:
                    if response.is_error:
                        response.read()
                    _raise_for(response)
                    if done and response.status_code != _PARTIAL:
                        raise BrokenStreamError("the file changed while it was read", code="changed")
                    tag = response.headers.get("etag", "")
                    for part in response.iter_bytes():
                        done, attempt = done + len(part), 0
                        yield part
                return
            except (httpx2.HTTPError, DiagonalError) as error:
                self._wait_to_try_again(error, attempt, possible=not done or bool(tag))
            attempt += 1

    def stream(self, video_id: str, start_chunk: int = 0) -> Iterator[bytes]:
        """The parts of a video's MP4 as they are made: its initialisation segment, then each chunk, whole.

        A connection that breaks is made again from the next chunk on; `VideoFailedError` when the video ended early.
        """
        chunk, begun, attempt = start_chunk, False, 0
        while True:
            try:
                for part in self._parts(video_id, chunk):
                    is_chunk = bool(split(part)[1])
                    if is_chunk or not begun:
                        yield part
                    begun, chunk, attempt = True, chunk + is_chunk, 0 if is_chunk else attempt
                return
            except (httpx2.HTTPError, DiagonalError) as error:
                self._wait_to_try_again(error, attempt)
            self._check_goes_on(video_id)
            attempt += 1

    def realtime(
        self,
        prompt: str,
        *,
        pacing: Pacing = "realtime",
        buffer_s: float | None = None,
        reconnect_s: float = 20.0,
        **wish: Unpack[Wish],
    ) -> Realtime:
        """A live session as `Wish` says, whose prompt can be changed while it plays; iterate over it for its chunks.

        An `endless` one goes on until it is stopped or closed, or the server's limit is reached.

        With `buffer_s` no more than that is made ahead of the viewer: of what `tell_position` says, or else of what
        was taken from the iteration. A connection that breaks is made again for at most `reconnect_s`.
        """
        fields = start_fields(prompt, pacing=pacing, buffer_s=buffer_s, **wish)
        key = self._http.headers.get("authorization")
        headers = {"Authorization": key} if key else {}
        url = str(self._http.base_url)
        return Realtime(url, headers, fields, timeout_s=self._timeout_s, reconnect_s=reconnect_s).open()

    def interact(self, video_id: str, prompt: str, *, event_id: str | None = None, transition_chunks: int = 0) -> str:
        """Change the prompt from the next chunk on; returns the event's id, which `interactions` of the video names."""
        return self._interact(video_id, {"prompt": prompt}, transition_chunks, event_id)

    def pause(self, video_id: str) -> str:
        """Make no more chunks for now; returns the event's id."""
        return self._interact(video_id, {"action": "pause"})

    def resume(self, video_id: str) -> str:
        """Go on after `pause`; returns the event's id."""
        return self._interact(video_id, {"action": "resume"})

    def share(
        self,
        video_id: str,
        *,
        role: Literal["watch", "steer"] = "watch",
        name: str = "",
        expires_in_s: int | None = None,
    ) -> dict[str, Any]:
        """A link of the video for somebody without a key, for `expires_in_s` seconds (the server's default is a day).

        `watch_url` is a page, `playlist_url` is for any HLS player: both are as secret as the `token` in them, which
        is told this once. With the role `steer` whoever has it changes the prompt, too, in the name of `name`.
        """
        lasts = {} if expires_in_s is None else {"expires_in_s": expires_in_s}
        answer = self._call("POST", f"/v1/videos/{video_id}/viewers", json={"role": role, "name": name} | lasts)
        urls = {f"{kind}_url": self.url + answer[f"{kind}_path"] for kind in ("watch", "playlist")}
        return answer | urls

    def viewers(self, video_id: str) -> builtins.list[dict[str, Any]]:
        """Whose links of the video count still."""
        return list(self._call("GET", f"/v1/videos/{video_id}/viewers")["data"])

    def revoke(self, video_id: str, viewer_id: str) -> None:
        """End a viewer's link."""
        self._call("DELETE", f"/v1/videos/{video_id}/viewers/{viewer_id}")

    def delete(self, video_id: str) -> None:
        """Cancel the video if it is not over, and remove it."""
        self._call("DELETE", f"/v1/videos/{video_id}")

    def _interact(
        self, video_id: str, event: Mapping[str, str], transition_chunks: int = 0, event_id: str | None = None
    ) -> str:
        """Told again, it is the same event."""
        interaction = {"event_id": event_id or os.urandom(8).hex(), "event": event}
        body = {"interaction": interaction | {"transition_chunks": transition_chunks}}
        return str(self._call("POST", f"/v1/videos/{video_id}/interactions", json=body)["event_id"])

    def _parts(self, video_id: str, start_chunk: int) -> Iterator[bytes]:
        reader = PartReader()
        path, params = f"/v1/videos/{video_id}/stream", {"start_chunk": start_chunk}
        with self._http.stream("GET", path, params=params) as response:
            if response.is_error:
                response.read()
            _raise_for(response)
            for data in response.iter_raw():
                yield from reader.feed(data)

    def _check_goes_on(self, video_id: str) -> None:
        """`VideoFailedError` when a stream was cut off because its video failed."""
        video = self.get(video_id)
        if video.over and video.status != "completed":
            raise _failed(video)

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        answer = self._send(method, path, **arguments).json()
        return dict(answer)

    def _send(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        attempt = 0
        while True:
            try:
                response = self._http.request(method, path, **arguments)
                _raise_for(response)
                return response
            except (httpx2.HTTPError, DiagonalError) as error:
                self._wait_to_try_again(error, attempt)
            attempt += 1

    def _wait_to_try_again(
        self, error: httpx2.HTTPError | DiagonalError, attempt: int, *, possible: bool = True
    ) -> None:
        """Wait before the next attempt; raises the error where another one is of no use, or was the last."""
        failure = error if isinstance(error, DiagonalError) else _no_answer(error, self.url)
        wait_s = _wait_s(failure, attempt)
        if attempt == self._max_retries or wait_s is None or not possible:
            raise failure from (None if failure is error else error)
        time.sleep(wait_s)


def _failed(video: Video) -> DiagonalError:
    return VideoFailedError(video.error or f"the video is {video.status}", status=200, code=video.status)


def _no_answer(error: httpx2.HTTPError, address: str) -> DiagonalError:
    reason = error or type(error).__name__
    return NoAnswerError(f"no whole answer from the server at {address}: {reason}", code="no_answer")


def _wait_s(failure: DiagonalError, attempt: int) -> float | None:
    """How long to wait before asking again; None when asking again is of no use."""
    if failure.status not in (0, *_TRY_AGAIN):
        return None
    backoff_s = _FIRST_WAIT_S * 2**attempt * (0.5 + secrets.randbelow(512) / 1024)
    wait_s = max(backoff_s, failure.retry_after_s or 0.0)
    return wait_s if wait_s <= _LONGEST_WAIT_S else None


def _raise_for(response: httpx2.Response) -> None:
    if not response.is_error:
        return
    try:
        problem = response.json()
        detail = problem["error"]
    except (ValueError, KeyError, TypeError):
        problem, detail = {}, {}
    wait = response.headers.get("retry-after", "")
    raise error_for(
        detail.get("message") or f"the server answered {response.status_code}",
        response.status_code,
        code=detail.get("code") or "",
        param=detail.get("param"),
        retry_after_s=float(wait) if wait.replace(".", "", 1).isdigit() else None,
        request_id=response.headers.get("x-request-id", ""),
    )
