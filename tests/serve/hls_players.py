"""Simple HLS players: each waits for the next chunk of a playlist, and fetches it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.serve.api.test_hls import entries

_FROM_THE_END = 3


@dataclass
class HlsPlayer:
    """One player: what it got of each chunk, and how long each request took, in seconds."""

    address: str  # of the playlist
    chunks: dict[int, bytes] = field(default_factory=dict)
    waited_s: list[float] = field(default_factory=list)
    fetched_s: list[float] = field(default_factory=list)

    async def play(self, chunks: int) -> None:
        """From three chunks before the newest one on, so many."""
        there = urlsplit(self.address)
        self._reader, self._writer = await asyncio.open_connection(there.hostname, there.port, limit=1 << 22)
        try:
            folder = there.path.rpartition("/")[0]
            text = (await self._get(there.path)).decode()
            await self._get(f"{folder}/init.mp4")
            first = int(text.partition("#EXT-X-MEDIA-SEQUENCE:")[2].partition("\n")[0])
            chunk = max(first, first + len(entries(text)) - _FROM_THE_END)
            for number in range(chunk, chunk + chunks):
                if number >= first + len(entries(text)):
                    began_s = time.monotonic()
                    text = (await self._get(f"{there.path}?_HLS_msn={number}")).decode()
                    self.waited_s.append(time.monotonic() - began_s)
                    first = int(text.partition("#EXT-X-MEDIA-SEQUENCE:")[2].partition("\n")[0])
                began_s = time.monotonic()
                self.chunks[number] = await self._get(f"{folder}/chunks/{number}.m4s")
                self.fetched_s.append(time.monotonic() - began_s)
        finally:
            self._writer.close()

    async def _get(self, path: str) -> bytes:
        """The body of an answer that says how long it is, as every part of a playlist does."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: players\r\n\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 200"), head
        return await self._reader.readexactly(int(head.partition("content-length:")[2].partition("\r\n")[0]))


async def play(address: str, players: int, chunks: int) -> list[HlsPlayer]:
    """So many players at once, who come within half a second."""
    made = [HlsPlayer(address) for _ in range(players)]

    async def one(player: HlsPlayer, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await player.play(chunks)

    await asyncio.gather(*(one(player, 0.5 * number / players) for number, player in enumerate(made)))
    return made
