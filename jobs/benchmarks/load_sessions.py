"""One session of a load, as a client that believes nothing: chunk numbers, hashes and timeline are checked."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from websockets.exceptions import WebSocketException

from diagonal.client import AsyncRealtime, BrokenStreamError, DiagonalError, ServerFullError
from diagonal.client.client import API_KEY_VARIABLE, local_key
from diagonal.client.errors import error_for
from diagonal.client.protocol import Chunk, Pacing, start_fields
from diagonal.evaluate.load.figures import Player, Trace
from diagonal.mp4 import PartReader, read_fragment, split, timescale

PROMPTS = (
    "a red circle moving right quickly",
    "a blue square moving left slowly",
    "a green triangle moving up quickly",
)
_TELL_EVERY_S = 0.25
_SLACK_S, _SLACK = 20.0, 3.0  # how much longer than its media a session may take
_WRONG = (DiagonalError, WebSocketException, httpx2.HTTPError, OSError, ValueError)


@dataclass(frozen=True)
class Plan:
    """What each session of a load asks for. `credits_s` is the media that a viewer with a player of his own wants."""

    url: str
    seconds: float = 10.0
    pacing: Pacing = "realtime"
    start_buffer_s: float = 0.9
    credits_s: float | None = None
    change_every: int = 4
    resume: bool = True

    @property
    def limit_s(self) -> float:
        return _SLACK_S + _SLACK * self.seconds

    @property
    def headers(self) -> dict[str, str]:
        key = os.environ.get(API_KEY_VARIABLE) or local_key(self.url)
        return {"Authorization": f"Bearer {key}"} if key else {}


class Observer:
    """Writes what one session sees into its trace."""

    def __init__(self, trace: Trace, zero_s: float, start_buffer_s: float) -> None:
        self._trace, self._zero_s = trace, zero_s
        self.player = Player(start_buffer_s)
        self._changed_s: dict[str, float] = {}

    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._zero_s

    def asked(self, at_s: float) -> None:
        self._trace.asked_s = at_s - self._zero_s

    def changes(self, event_id: str) -> None:
        """A prompt change is sent."""
        self._changed_s[event_id] = self.now_s()

    def saw(self, frames: int, fps: int) -> None:
        """A chunk came."""
        self._trace.arrivals.append((self.now_s(), frames))
        self.player.arrived(self.now_s(), frames / fps)
        self._trace.stalls, self._trace.stall_s = self.player.stalls, self.player.stall_s

    def saw_change(self, chunk: Chunk, fps: int) -> None:
        """Note when changes came and when they show."""
        for event_id in chunk.started_events:
            sent_s, now_s = self._changed_s[event_id], self.now_s()
            self._trace.prompt_chunk_s.append(now_s - sent_s)
            self._trace.prompt_shown_s.append(max(now_s, self.player.shown_s(chunk.first_frame / fps)) - sent_s)

    def ended(self, error: BaseException | None) -> None:
        """How the session ended: completed, refused for lack of room, or failed with a code."""
        trace = self._trace
        if error is None:
            trace.outcome = "completed"
            return
        trace.outcome = "rejected" if isinstance(error, ServerFullError) else "failed"
        trace.code = getattr(error, "code", "") or type(error).__name__
        trace.answered_s = self.now_s() - trace.asked_s
        trace.retry_after_s = getattr(error, "retry_after_s", None)


async def run_session(plan: Plan, number: int, zero_s: float, http: httpx2.AsyncClient, carrier: str = "ws") -> Trace:
    """A whole session; whatever happens to it is in its trace, and it takes no longer than `plan.limit_s`."""
    trace = Trace(carrier=carrier)
    observer = Observer(trace, zero_s, plan.start_buffer_s)
    observer.asked(time.monotonic())
    try:
        async with asyncio.timeout(plan.limit_s):
            if carrier == "ws":
                await by_socket(plan, number, observer, trace)
            else:
                await by_http(plan, number, observer, http)
        observer.ended(None)
    except (*_WRONG, TimeoutError) as error:
        observer.ended(error)
    return trace


async def by_socket(plan: Plan, number: int, observer: Observer, trace: Trace) -> None:
    """Over `WS /v1/realtime/video`, with prompt changes on the way."""
    prompt = PROMPTS[number % len(PROMPTS)]
    fields = start_fields(prompt, seconds=plan.seconds, seed=number, pacing=plan.pacing, buffer_s=plan.credits_s)
    live = AsyncRealtime(plan.url, plan.headers, fields, reconnect_s=10.0 if plan.resume else 0.0)
    began_s = time.monotonic()
    try:
        await live.open()
    finally:
        observer.asked(live.asked_s)
        trace.connect_s = live.asked_s - began_s
    async with _telling(live, observer, plan.credits_s):
        async for chunk in live:
            observer.saw(chunk.frames, live.opening.fps)
            observer.saw_change(chunk, live.opening.fps)
            trace.reconnects = live.reconnects
            if plan.change_every and chunk.index % plan.change_every == 1:
                event_id = f"change-{chunk.index}"
                observer.changes(event_id)
                await live.change(PROMPTS[(number + chunk.index) % len(PROMPTS)], event_id=event_id)


@asynccontextmanager
async def _telling(live: AsyncRealtime, observer: Observer, credits_s: float | None) -> AsyncIterator[None]:
    """Tell how far the viewer's player is, where he wants it to count; leave at the end."""

    async def tell() -> None:
        while True:
            await live.tell_position(observer.player.position_s(observer.now_s()))
            await asyncio.sleep(_TELL_EVERY_S)

    task = asyncio.create_task(tell()) if credits_s is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
        await live.close()


async def by_http(plan: Plan, number: int, observer: Observer, http: httpx2.AsyncClient) -> None:
    """`POST /v1/videos`, then its stream."""
    fields = start_fields(PROMPTS[number % len(PROMPTS)], seconds=plan.seconds, seed=number, pacing=plan.pacing)
    observer.asked(time.monotonic())
    video = checked(await http.post("/v1/videos", json=fields)).json()
    timeline = Timeline(video["fps"])
    async with http.stream("GET", f"/v1/videos/{video['id']}/stream") as answer:
        if answer.is_error:
            await answer.aread()
        checked(answer)
        reader = PartReader()
        async for data in answer.aiter_raw():
            for part in reader.feed(data):
                if frames := timeline.take(part):
                    observer.saw(frames, video["fps"])
    if timeline.frames != video["num_frames"]:
        raise _broken("chunk_missing", f"the stream ended after {timeline.frames} of {video['num_frames']} frames")


class Timeline:
    """The parts of a fragmented MP4 follow each other without a gap and without an overlap."""

    def __init__(self, fps: int) -> None:
        self._fps, self._scale = fps, 0
        self._end_ticks = self._sequence = self.frames = 0

    def take(self, part: bytes) -> int:
        """Pixel frames of the next part, 0 of an initialisation segment; `BrokenStreamError` for one out of place."""
        init, media = split(part)
        if init:
            self._scale = timescale(init)
        if not media:
            return 0
        fragment = read_fragment(media)
        if (fragment.start_ticks, fragment.sequence) != (self._end_ticks, self._sequence + 1):
            raise _broken("wrong_place", f"a part begins at tick {fragment.start_ticks}, wanted is {self._end_ticks}")
        self._end_ticks, self._sequence = fragment.end_ticks, fragment.sequence
        self.frames += fragment.frames
        if self._end_ticks * self._fps != self.frames * self._scale:
            raise _broken("wrong_duration", f"{self.frames} frames last {self._end_ticks} ticks of {self._scale}")
        return fragment.frames


def checked(answer: httpx2.Response) -> httpx2.Response:
    """The answer if it is no error; else the error that it tells."""
    if answer.is_error:
        try:
            detail: dict[str, Any] = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            detail = {"message": f"the server answered {answer.status_code}", "code": str(answer.status_code)}
        wait = answer.headers.get("retry-after")
        raise error_for(
            detail["message"], answer.status_code, code=detail["code"], retry_after_s=float(wait) if wait else None
        )
    return answer


def _broken(code: str, message: str) -> BrokenStreamError:
    return BrokenStreamError(message, status=200, code=code)
