"""`WS /v1/realtime/video`: one session a socket, its chunks paced by the viewer, its prompt changed on the way.

A connection that breaks is not the end: whoever shows the newest resume token within `resume_window_s` goes on with
the next chunk, through any gateway. A connection that is closed properly, or `session.stop`, ends the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from fastapi.websockets import WebSocketState

from serve.api.auth import SUBPROTOCOL
from serve.gateway.gateway import Gateway
from serve.gateway.reader import ChunkReader
from serve.records import LIVE, Caller, Segment, Status, VideoRecord
from serve.rpc import UNAVAILABLE
from serve.tokens import RESUME, new_secret, parse_secret
from serve.wire import messages
from serve.wire.problems import Problem, unavailable
from serve.wire.schemas import MAX_MESSAGE_BYTES, InteractionRequest

_LOG = logging.getLogger("ray.serve")
DONE, GOING_AWAY, UNSUPPORTED, POLICY, TOO_LARGE, INTERNAL, FULL = 1000, 1001, 1003, 1008, 1009, 1011, 1013
TAKEN_OVER = 4001
RESTART = 1012  # this gateway ends; the viewer goes on through another one
_LAST_WORD_S = 5.0
_CLOSE_CODES = {413: TOO_LARGE, 415: UNSUPPORTED, 429: FULL, 503: FULL, 500: INTERNAL}  # by a problem's status
_CLEAN = (DONE, GOING_AWAY)
_FAILED = Problem(500, "generation_failed", "generation failed")
_INTERNAL = Problem(500, "internal_error", "something went wrong on the server")


class Ending(Enum):
    """How a session on a socket ends: the close code, why its video is cancelled ('' is not), may its viewer return?

    Where the code is None nobody reads it, or a problem names its own.
    """

    LEFT = (None, "the viewer left", False)
    LOST = (None, "", True)
    DRAINING = (RESTART, "", True)
    REFUSED = (None, "what its viewer did was refused", False)
    TAKEN_OVER = (TAKEN_OVER, "", False)
    BROKEN = (INTERNAL, "", True)
    STOPPED = (DONE, "stopped by its viewer", False)
    DONE = (DONE, "", False)

    def __init__(self, close_code: int | None, cancels: str, may_return: bool) -> None:
        self.close_code, self.cancels, self.may_return = close_code, cancels, may_return


class _DrainError(Exception):
    """This gateway is about to end."""


@dataclass(frozen=True)
class RealtimeLimits:
    """How long a socket may be silent."""

    start_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0


class RealtimeSession:
    """One socket, from its first message to its end."""

    def __init__(self, socket: WebSocket, gateway: Gateway, caller: Caller, limits: RealtimeLimits) -> None:
        self._socket, self._gateway, self._caller, self._limits = socket, gateway, caller, limits
        self._sending = asyncio.Lock()
        self._progress_s = time.monotonic()
        self._window_s: float | None = None
        self._token = ""
        self._sent, self._next_chunk = 0, 0
        self._stopped, self._stop_asked_s = False, 0.0

    async def run(self) -> None:
        """Until the stream is over, the viewer leaves, or something is wrong."""
        offered = self._socket.scope.get("subprotocols", [])
        await self._socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            video, reader, chunk = await self._start()
        except (Problem, *UNAVAILABLE) as error:
            await self._refuse(error if isinstance(error, Problem) else unavailable())
        except WebSocketDisconnect:
            return
        except Exception as error:  # edge: no socket ends without a word, and no text of an error in a log
            _LOG.error("session.start: %s", type(error).__name__)
            await self._refuse(_INTERNAL)
        else:
            await self._stream(video, reader, chunk)

    async def _start(self) -> tuple[VideoRecord, ChunkReader, int]:
        """Read the first message and hold its session: the video, a reader of it, and the chunk to begin with."""
        try:
            async with asyncio.timeout(self._limits.start_timeout_s):
                start = messages.parse_start(await self._receive())
        except TimeoutError:
            raise Problem(408, "start_timeout", "session.start did not come in time") from None
        self._window_s = start.window_s
        self._token, secret = new_secret(RESUME)
        if start.resume_token is None:
            span = self._socket.headers.get("traceparent", "")
            video, chunk = await self._gateway.create(start, self._caller, None, secret.hash, span), 0
        else:
            video, chunk = await self._take_over(start.resume_token, secret.hash)
        self._next_chunk = chunk
        reader = self._gateway.reader(video, LIVE + secret.hash, resumed=start.resume_token is not None)
        if self._window_s is not None:
            await reader.tell_position(0.0, self._window_s)
        try:
            await self._send(messages.started(video, chunk, self._window_s, self._resume_token(chunk)))
        except WebSocketDisconnect:
            if start.resume_token is None:  # who never got a token cannot come back
                await self._cancel(video, "the viewer left")
            raise
        return video, reader, chunk

    async def _take_over(self, token: str, new_hash: str) -> tuple[VideoRecord, int]:
        text, _, chunk = token.rpartition(".")
        secret = parse_secret(RESUME, text)
        if secret is not None and chunk.isdecimal() and len(chunk) < 10:
            video = await self._gateway.take_over(self._caller, secret.hash, new_hash)
            if video is not None:
                return video, int(chunk)
        raise Problem(404, "session_not_found", "this resume token does not count (any more)", param="resume_token")

    async def _stream(self, video: VideoRecord, reader: ChunkReader, chunk: int) -> None:
        """Send and listen at once; whichever ends first ends all."""
        streams = (self._send_chunks(video, reader, chunk), self._listen(video, reader))
        tasks = [asyncio.create_task(work) for work in (*streams, self._watch_for_stall(), self._watch_for_drain())]
        returning_s = 0.0
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD_S), self._sending:  # no chunk is parted from its metadata
                    _cancel_all(tasks)
            _cancel_all(tasks)
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            returning_s = await self._end(video, [end for end in ends if isinstance(end, Exception)])
        finally:
            _cancel_all(tasks)
            self._gateway.leave_later(reader, returning_s)

    async def _end(self, video: VideoRecord, errors: list[Exception]) -> float:
        """Close the socket, and the session unless its viewer may come back: within how many seconds."""
        ending, problem = await self._ending(video, errors)
        if ending.cancels:
            await self._cancel(video, problem.detail if problem else ending.cancels)
        if problem is not None:
            await self._refuse(problem, video.id, ending.close_code)
        elif ending is Ending.DRAINING:
            await self._last_word(messages.draining(video, self._resume_token(self._next_chunk)), RESTART, "draining")
        elif ending.close_code == DONE:
            await self._tell_dropped(video)
            latency_s = time.monotonic() - self._stop_asked_s if self._stop_asked_s else None
            await self._last_word(messages.done(video, self._sent, self._stopped, latency_s), DONE)
        return self._gateway.settings.resume_window_s if ending.may_return else 0.0

    async def _ending(self, video: VideoRecord, errors: list[Exception]) -> tuple[Ending, Problem | None]:
        """What the errors of all tasks come to, and the problem that the viewer is told."""
        if any(isinstance(error, WebSocketDisconnect) for error in errors):
            return (Ending.LEFT if await self._said_goodbye(errors) else Ending.LOST), None
        if any(isinstance(error, _DrainError) for error in errors):
            return Ending.DRAINING, None
        if problem := next((error for error in errors if isinstance(error, Problem)), None):
            return (Ending.TAKEN_OVER if problem.code == "session_taken_over" else Ending.REFUSED), problem
        if errors:
            _LOG.error("session %s: %s", video.id, type(errors[0]).__name__)
            if isinstance(errors[0], UNAVAILABLE):
                return Ending.LOST, unavailable()  # closed as full: the viewer comes back
            return Ending.BROKEN, _INTERNAL
        return (Ending.STOPPED if self._stopped else Ending.DONE), None

    async def _send_chunks(self, video: VideoRecord, reader: ChunkReader, chunk: int) -> None:
        prefix = b""
        if chunk == 0:
            init = await reader.read(-1)
            prefix = init.data if init is not None and init.data is not None else b""
        while True:
            segment = await reader.read(chunk)
            if segment is None or segment.data is None:
                return self._check_end(segment)
            await self._send_chunk(video, segment, chunk, prefix)
            reader.note_sent(segment)
            self._touch()
            prefix, chunk = b"", chunk + 1

    async def _send_chunk(self, video: VideoRecord, segment: Segment, chunk: int, prefix: bytes) -> None:
        data = prefix + (segment.data or b"")
        about = (segment, chunk, self._sent, len(data), self._resume_token(chunk + 1))
        async with self._sending:  # the pair is never parted
            await self._socket.send_json(messages.chunk_metadata(video, *about))
            await self._socket.send_bytes(data)
        self._sent, self._next_chunk = self._sent + 1, chunk + 1

    async def _said_goodbye(self, errors: list[Exception]) -> bool:
        """Whether the viewer stopped or closed properly. A send that met a closed socket does not know: read on."""
        codes = [error.code for error in errors if isinstance(error, WebSocketDisconnect)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                while not self._stopped and self._socket.client_state is not WebSocketState.DISCONNECTED:
                    codes.append((await self._socket.receive()).get("code", 0))
        return self._stopped or any(code in _CLEAN for code in codes)

    def _check_end(self, segment: Segment | None) -> None:
        if segment is None:
            raise Problem(404, "video_not_found", "the video was removed")
        if segment.superseded:
            raise Problem(409, "session_taken_over", "another connection goes on with this session")
        if segment.gone:
            raise Problem(410, "chunk_gone", "of an endless stream the newest chunks alone are kept")
        if segment.status is Status.FAILED:
            raise Problem(500, segment.error_code or _FAILED.code, _FAILED.detail)
        self._stopped = segment.status is Status.CANCELLED

    async def _listen(self, video: VideoRecord, reader: ChunkReader) -> None:
        """Take the viewer's messages until he stops; what is wrong with one is told, and the stream goes on."""
        while not self._stopped:
            text = await self._receive()
            try:
                await self._handle(text, video, reader)
            except (Problem, *UNAVAILABLE) as error:
                problem = error if isinstance(error, Problem) else unavailable()
                self._gateway.count_error(problem.code)
                await self._send(messages.failed(problem, video.id, messages.event_id_of(text)))

    async def _watch_for_stall(self) -> None:
        """`Problem` when neither a chunk went out nor a message came in for too long."""
        limit_s = self._limits.stall_timeout_s
        while (left_s := self._progress_s + limit_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        raise Problem(408, "stall_timeout", f"no chunk and no message for {limit_s:g} s")

    async def _watch_for_drain(self) -> None:
        await self._gateway.wait_for_drain()
        raise _DrainError

    async def _handle(self, text: str, video: VideoRecord, reader: ChunkReader) -> None:
        control = messages.parse_control(text)
        self._touch()
        if isinstance(control, messages.SessionStop):
            self._stopped, self._stop_asked_s = True, time.monotonic()
        elif isinstance(control, messages.SessionPing):
            await self._send({"type": "session.pong"})
        elif isinstance(control, messages.SessionPlayback):
            if self._window_s is None:
                raise Problem(
                    400,
                    "no_credits",
                    "session.start did not ask for it by streaming_buffer_seconds or streaming_pacing",
                )
            await reader.tell_position(control.position_seconds, self._window_s)
        elif isinstance(control, InteractionRequest):
            event_id = await self._gateway.interact(video.id, control, self._caller)
            await self._send(messages.queued(video, event_id))

    async def _receive(self) -> str:
        """The next text message; `Problem` for one that is too large or not text."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        text = message.get("text")
        if text is None:
            raise Problem(415, "unsupported_message", "messages to the server are text")
        if len(text) > MAX_MESSAGE_BYTES or len(text.encode()) > MAX_MESSAGE_BYTES:
            raise Problem(413, "message_too_large", f"a message has at most {MAX_MESSAGE_BYTES} bytes")
        return str(text)

    async def _tell_dropped(self, video: VideoRecord) -> None:
        """Name the changes that came too late to show."""
        problem = Problem(409, "interaction_failed", "the stream ended before it took effect")
        with contextlib.suppress(Problem, *UNAVAILABLE, WebSocketDisconnect, RuntimeError):
            for change in (await self._gateway.get(video.id, self._caller)).interactions:
                if change.chunk is None:
                    await self._send(messages.failed(problem, video.id, change.event_id))

    async def _cancel(self, video: VideoRecord, message: str) -> None:
        with contextlib.suppress(*UNAVAILABLE):  # then its driver sees that nobody reads
            await self._gateway.cancel(video, "abandoned", message)

    async def _refuse(self, problem: Problem, request_id: str | None = None, code: int | None = None) -> None:
        self._gateway.count_error(problem.code)
        code = code or _CLOSE_CODES.get(problem.status, POLICY)
        await self._last_word(messages.failed(problem, request_id), code, problem.code)

    async def _last_word(self, message: dict[str, Any], code: int, reason: str = "") -> None:
        """Send and close, as far as somebody is there who reads."""
        for work in (self._send(message), self._socket.close(code, reason)):
            with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
                async with asyncio.timeout(_LAST_WORD_S):
                    await work

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_json(message)

    def _resume_token(self, chunk: int) -> str:
        """Whoever shows this goes on with that chunk."""
        return f"{self._token}.{chunk}"

    def _touch(self) -> None:
        self._progress_s = time.monotonic()


def _cancel_all(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
