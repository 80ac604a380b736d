"""A live session over `WS /v1/realtime/video`: iterate for its chunks, change its prompt meanwhile; sync and asyncio.

A connection that breaks, a server that drains, a gateway that dies: the session goes on over a new connection by its
resume token, and the chunks that come are the same without a gap. Another connection that took it over ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidProxy, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from diagonal.client.connection import environment_error, is_this_machine
from diagonal.client.errors import DiagonalError, NoAnswerError, error_for
from diagonal.client.files import write_kept
from diagonal.client.protocol import Change, Chunk, Opening, StreamState

ROUTE = "/v1/realtime/video"
_LARGEST_CHUNK_BYTES = 1 << 26
_FIRST_TRIES_S = 2.0
_WAITS_S = (0.05, 0.1, 0.2, 0.4, 0.8)  # between tries to connect; the last one is repeated
_UNREACHABLE = (OSError, InvalidHandshake, TimeoutError, ConnectionClosed, InvalidProxy, ImportError)


class _Link:
    """What both kinds of connection share: address, patience, and the session's state.

    `reconnects` counts connections after the first; `asked_s` is when the newest one said `session.start`.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        fields: Mapping[str, Any],
        *,
        timeout_s: float = 60.0,
        reconnect_s: float = 20.0,
        ping_every_s: float = 15.0,
    ) -> None:
        self._address = f"{url.rstrip('/').replace('http', 'ws', 1)}{ROUTE}"
        self._timeout_s, self._reconnect_s, self._ping_every_s = timeout_s, reconnect_s, ping_every_s
        self._options: dict[str, Any] = {
            "additional_headers": dict(headers),
            "open_timeout": timeout_s,
            "close_timeout": 2.0,
            "max_size": _LARGEST_CHUNK_BYTES,
            "compression": None,  # video does not shrink
            "proxy": None if is_this_machine(url) else True,  # True: those of the environment
        }
        self.state = StreamState(fields)
        self.reconnects = 0
        self._tells_position = self._left = False
        self._heard_s = self.asked_s = time.monotonic()

    @property
    def opening(self) -> Opening:
        """What the server said when the session began."""
        assert self.state.opening_answer is not None  # `open` returned
        return self.state.opening_answer

    @property
    def changes(self) -> Mapping[str, Change]:
        """Prompt changes and pauses by event id: sent, queued, started, completed, or refused and why."""
        return self.state.changes

    def _tries(self) -> Iterator[float]:
        """How long to wait before each next try, until it is too late; the first try waits for nothing."""
        patience_s = self._reconnect_s if self.state.token else _FIRST_TRIES_S
        end_s, number = time.monotonic() + patience_s, 0
        yield 0.0
        while time.monotonic() < end_s:
            yield _WAITS_S[min(number, len(_WAITS_S) - 1)]
            number += 1

    def _consumed(self) -> str | None:
        """Of a viewer who tells no position, what he took counts as played."""
        if self.state.window_s is None or self._tells_position:
            return None
        return self.state.position(self.state.media_s)

    def _silent(self) -> bool:
        return time.monotonic() - self._heard_s > self._timeout_s


class Realtime(_Link):
    """A live session, opened by `DiagonalClient.realtime`; close it, or use it as a context manager.

    Methods but the iteration may be called from other threads. Iterate at least once a minute, also while it is
    paused: a session in which nothing moves is ended by the server.
    """

    _socket: ClientConnection

    def open(self) -> Realtime:
        """Begin the session; `DiagonalError` when it is refused."""
        failure: Exception | None = None
        for wait_s in self._tries():
            time.sleep(wait_s)
            try:
                self._socket = connect(self._address, **self._options)
                self.asked_s = time.monotonic()
                self._socket.send(self.state.opening())
                while not self.state.answered:
                    self.state.receive(self._socket.recv(self._timeout_s))
                for message in self.state.reminders():
                    self._socket.send(message)
                self._heard_s = time.monotonic()
                return self
            except _UNREACHABLE as error:
                failure = error
                _check_final(self.state, error)
        raise _unreachable(failure)

    def __enter__(self) -> Realtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; a session that is not over ends."""
        self._left = True
        self._socket.close()

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks in order, each once, as they come; ends with the stream."""
        while not self.state.done:
            try:
                chunk = self.state.receive(self._socket.recv(self._ping_every_s))
            except TimeoutError:
                self._ping()
                continue
            except ConnectionClosed as error:
                if self._left:
                    return
                self.state.closed(close_code(error))
                self.reconnects += 1
                self.open()
                continue
            self._heard_s = time.monotonic()
            if chunk is not None:
                yield chunk
                if position := self._consumed():
                    self._say(position)
        self._socket.close()

    def change(self, prompt: str, *, transition_chunks: int = 0, event_id: str | None = None) -> str:
        """Change the prompt from the next chunk on; returns the event's id, by which `changes` tells of it."""
        return self._interact({"prompt": prompt}, transition_chunks, event_id)

    def pause(self) -> str:
        """Make no more chunks for now; what is made meanwhile still comes."""
        return self._interact({"action": "pause"})

    def resume(self) -> str:
        """Go on after `pause`."""
        return self._interact({"action": "resume"})

    def tell_position(self, seconds: float) -> None:
        """How far the viewer has played, where `buffer_s` was asked for; a chunk is made when less is ahead."""
        self._tells_position = True
        self._say(self.state.position(seconds))

    def stop(self) -> None:
        """End the stream where it is; the iteration ends with what was under way."""
        self._say(self.state.stop())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all chunks that come, from the first on, to a file; one that is cut off is kept as `path`.part."""
        return write_kept(path, (chunk.data for chunk in self))

    def _interact(self, event: Mapping[str, Any], transition_chunks: int = 0, event_id: str | None = None) -> str:
        change = self.state.change(event, transition_chunks, event_id)
        self._say(change.message)
        return change.event_id

    def _say(self, message: str) -> None:
        try:
            self._socket.send(message)
        except ConnectionClosed:
            pass  # the iteration sees it too, connects again, and says what counts again

    def _ping(self) -> None:
        if self._silent():
            self._socket.socket.close()  # a network that is gone says nothing
        else:
            self._say(self.state.ping())


class AsyncRealtime(_Link):
    """The same with asyncio: `async with AsyncRealtime(url, headers, start_fields(...)) as live`, then `async for`."""

    _socket: AsyncConnection

    async def open(self) -> AsyncRealtime:
        """Begin the session; `DiagonalError` when it is refused."""
        failure: Exception | None = None
        for wait_s in self._tries():
            await asyncio.sleep(wait_s)
            try:
                self._socket = await connect_async(self._address, **self._options)
                await self.begin()
                return self
            except _UNREACHABLE as error:
                failure = error
                _check_final(self.state, error)
        raise _unreachable(failure)

    async def begin(self) -> None:
        """Say `session.start` on a fresh connection and wait for its answer."""
        self.asked_s = time.monotonic()
        await self._socket.send(self.state.opening())
        async with asyncio.timeout(self._timeout_s):
            while not self.state.answered:
                self.state.receive(await self._socket.recv())
        for message in self.state.reminders():
            await self._socket.send(message)
        self._heard_s = time.monotonic()

    async def __aenter__(self) -> AsyncRealtime:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave; a session that is not over ends."""
        self._left = True
        await self._socket.close()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Chunks in order, each once, as they come; ends with the stream."""
        while not self.state.done:
            try:
                async with asyncio.timeout(self._ping_every_s):
                    message = await self._socket.recv()
            except TimeoutError:
                await self._ping()
                continue
            except ConnectionClosed as error:
                if self._left:
                    return
                self.state.closed(close_code(error))
                self.reconnects += 1
                await self.open()
                continue
            self._heard_s = time.monotonic()
            chunk = self.state.receive(message)
            if chunk is not None:
                yield chunk
                if position := self._consumed():
                    await self._say(position)
        await self._socket.close()

    async def change(self, prompt: str, *, transition_chunks: int = 0, event_id: str | None = None) -> str:
        """Change the prompt from the next chunk on; returns the event's id, by which `changes` tells of it."""
        return await self._interact({"prompt": prompt}, transition_chunks, event_id)

    async def pause(self) -> str:
        return await self._interact({"action": "pause"})

    async def resume(self) -> str:
        return await self._interact({"action": "resume"})

    async def tell_position(self, seconds: float) -> None:
        """How far the viewer has played, where `buffer_s` was asked for; a chunk is made when less is ahead."""
        self._tells_position = True
        await self._say(self.state.position(seconds))

    async def stop(self) -> None:
        """End the stream where it is; the iteration ends with what was under way."""
        await self._say(self.state.stop())

    async def _interact(self, event: Mapping[str, Any], transition_chunks: int = 0, event_id: str | None = None) -> str:
        change = self.state.change(event, transition_chunks, event_id)
        await self._say(change.message)
        return change.event_id

    async def _say(self, message: str) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed:
            pass  # the iteration sees it too, connects again, and says what counts again

    async def _ping(self) -> None:
        if self._silent():
            self._socket.transport.abort()  # a network that is gone says nothing
        else:
            await self._say(self.state.ping())


def close_code(error: ConnectionClosed) -> int:
    """The code with which the server closed; 1006 when it did not."""
    return error.rcvd.code if error.rcvd else 1006


def _check_final(state: StreamState, error: Exception) -> None:
    """Raise what trying again does not mend."""
    if isinstance(error, InvalidProxy | ImportError):
        raise environment_error(error) from error
    if isinstance(error, ConnectionClosed):
        state.closed(close_code(error))
    elif isinstance(error, InvalidStatus):
        refused = _refusal(error)
        if not isinstance(refused, NoAnswerError):
            raise refused


def _refusal(error: InvalidStatus) -> DiagonalError:
    """The problem with which the server answered the upgrade."""
    status = error.response.status_code
    try:
        problem = json.loads(error.response.body or b"")
        detail = problem["error"]
    except (ValueError, KeyError, TypeError):
        return error_for(f"the server answered {status}", status)
    wait = error.response.headers.get("Retry-After", "")
    return error_for(
        detail["message"],
        status,
        code=detail["code"],
        param=detail["param"],
        retry_after_s=float(wait) if wait.isdigit() else None,
        request_id=problem.get("request_id", ""),
    )


def _unreachable(failure: Exception | None) -> DiagonalError:
    if isinstance(failure, InvalidStatus):
        return _refusal(failure)
    return NoAnswerError(f"no connection to the server: {failure or 'timeout'}", code="no_answer")
