"""A bad network on loopback: a TCP proxy that delays, that is narrow, or that swallows everything without a word."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_PART_BYTES = 8192
_QUEUED_PARTS = 32  # what lies in the network itself; behind it, the sender's own buffers fill


@dataclass
class Wire:
    """`delay_s` each way, up to `jitter_s` more; `bytes_per_s` each way, 0 is no limit.

    While `dead` nothing passes and nobody is told: a pulled cable, which no end of a connection sees.
    """

    upstream: str
    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    dead: bool = False
    url: str = ""
    passed_bytes: int = 0
    """Towards the client."""
    _random: random.Random = field(default_factory=lambda: random.Random(5))
    _carried: dict[asyncio.Task[None], asyncio.AbstractEventLoop] = field(default_factory=dict)

    def cut(self) -> None:
        """Break every connection that there is; new ones pass."""
        for task, loop in list(self._carried.items()):
            loop.call_soon_threadsafe(task.cancel)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes it."""
        task: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]
        self._carried[task] = asyncio.get_running_loop()
        task.add_done_callback(self._carried.pop)
        there = urlsplit(self.upstream)
        try:
            far_reader, far_writer = await asyncio.open_connection(there.hostname, there.port, limit=_PART_BYTES)
        except OSError:
            return writer.close()
        ways = [self._way(reader, far_writer, False), self._way(far_reader, writer, True)]
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (writer, far_writer):
                one.transport.abort()

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: bool) -> None:
        parts: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_PARTS)
        sender = asyncio.create_task(self._send(parts, writer, counts))
        try:
            while data := await reader.read(_PART_BYTES):
                delay_s = self.delay_s + self._random.random() * self.jitter_s
                await parts.put((time.monotonic() + delay_s, data))
            await parts.put((0.0, b""))
            await sender
        finally:
            sender.cancel()

    async def _send(
        self, parts: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, counts: bool
    ) -> None:
        free_s = 0.0
        while True:
            due_s, data = await parts.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic(), free_s - time.monotonic()))
            while self.dead:
                await asyncio.sleep(0.05)
            if not data:
                return
            if self.bytes_per_s:
                free_s = max(free_s, time.monotonic()) + len(data) / self.bytes_per_s
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
            self.passed_bytes += len(data) * counts


@contextmanager
def wire(upstream: str, **how: float) -> Iterator[Wire]:
    """A running wire to `upstream`; the viewer connects to its `url`."""
    made = Wire(upstream, **how)  # type: ignore[arg-type]
    up, down = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        server = await asyncio.start_server(made.carry, "127.0.0.1", 0, limit=_PART_BYTES)
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        up.set()
        await down.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert up.wait(10), "the wire did not start"
    try:
        yield made
    finally:
        loops[0].call_soon_threadsafe(down.set)
        thread.join(10)
