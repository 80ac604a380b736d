"""A new session gets an encoder that is there already; another one is made when those who began have had their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diagonal.media.encode import ChunkEncoder
from diagonal.mp4 import read_fragment
from serve.replica import encoder_pool
from serve.replica.encoder_pool import SpareEncoders


class Maker:
    """Makes encoders of 16x16 pixels, and counts them."""

    def __init__(self) -> None:
        self.made: list[ChunkEncoder] = []

    def __call__(self, scale: int) -> ChunkEncoder:
        self.made.append(ChunkEncoder(16, 16, 16, scale=scale))
        return self.made[-1]


def run(scene: Callable[[SpareEncoders, Maker], Awaitable[None]], count: int = 2) -> None:
    async def all_of_it() -> None:
        with ThreadPoolExecutor(1) as pool:
            maker = Maker()
            found = SpareEncoders(maker, 8, count, pool)
            try:
                await scene(found, maker)
            finally:
                found.close()

    asyncio.run(all_of_it())


def test_an_encoder_is_there_and_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_pool, "_PAUSE_S", 0.05)

    async def scene(found: SpareEncoders, maker: Maker) -> None:
        assert len(maker.made) == 2
        first, second = found.take(8), found.take(8)
        assert [first, second] == maker.made and first is not second
        third = found.take(8)
        assert third is maker.made[2], "where none is left it is made at once"
        while len(maker.made) < 5:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert len(maker.made) == 5, "there are two again, and no more"
        assert found.take(8) is maker.made[3]

    run(scene)


def test_who_begins_is_not_disturbed_by_the_next_one_that_is_made() -> None:
    async def scene(found: SpareEncoders, maker: Maker) -> None:
        found.take(8)
        await asyncio.sleep(0.1)
        assert len(maker.made) == 2

    run(scene)


def test_once_closed_none_is_made_beforehand_not_even_for_who_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_pool, "_PAUSE_S", 0.01)

    async def scene(found: SpareEncoders, maker: Maker) -> None:
        found.close()
        found.take(8)
        await asyncio.sleep(0.2)
        assert len(maker.made) == 2

    run(scene)


def test_another_scale_is_made_for_who_asks_and_a_stream_goes_on_where_it_was() -> None:
    async def scene(found: SpareEncoders, maker: Maker) -> None:
        assert found.take(2).scale == 2 and len(maker.made) == 3
        encoder = found.take(8, first_pixel_frame=33, sequence=4)
        fragment = read_fragment(encoder.encode_chunk(np.zeros((12, 16, 16, 3), np.uint8)))
        again = ChunkEncoder(16, 16, 16, scale=8, first_pixel_frame=33, sequence=4)
        assert (fragment.sequence, fragment.frames) == (4, 12)
        assert fragment == read_fragment(again.encode_chunk(np.zeros((12, 16, 16, 3), np.uint8)))

    run(scene)
