"""The store: in which order it lets things happen, who waits for what, and that nothing is half there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diagonal.media.encode import read_mp4
from serve.records import Pacing, PutChunks, Status
from serve.settings import ServeSettings
from serve.store.media_files import MediaFiles
from serve.store.store import Store
from tests.serve.harness import VIDEO, chunks, put_video


def in_store(tmp_path: Path, work: Callable[[Store], Awaitable[Any]], **options: float) -> Any:
    async def run() -> Any:
        store = Store(ServeSettings(data=str(tmp_path)), **options)
        try:
            return await work(store)
        finally:
            await store.shut()

    return asyncio.run(run())


def test_the_last_chunk_makes_the_file(tmp_path: Path) -> None:
    init, made = chunks()

    async def work(store: Store) -> None:
        await put_video(store, init)
        assert await store.content("video_1", 0, 10) is None
        for chunk in made:
            assert await store.put_chunks(PutChunks("video_1", 0, [chunk]))
        video = await store.get("video_1")
        assert video is not None and video.status is Status.COMPLETED
        found = await store.content("video_1", 0, 1 << 20)
        assert found is not None and found[0] == len(found[1]) and read_mp4(found[1]).shape == (21, 32, 32, 3)
        assert (await store.content("video_1", 4, 8)) == (found[0], b"ftyp")

    in_store(tmp_path, work)


@pytest.mark.parametrize("pacing", list(Pacing))
def test_chunks_that_came_together_are_read_together_unless_a_viewer_paces_them(tmp_path: Path, pacing: Pacing) -> None:
    init, made = chunks()

    async def work(store: Store) -> None:
        await put_video(store, init, replace(VIDEO, pacing=pacing))
        assert not await store.put_chunks(PutChunks("video_1", 0, made[1:])), "the first one is missing"
        for _ in range(2):  # the answer was lost
            assert await store.put_chunks(PutChunks("video_1", 0, made[:1], b"whole", True))
        assert await store.put_chunks(PutChunks("video_1", 0, made[1:], b"more"))
        assert await store.put_chunks(PutChunks("video_1", 0, made)) is None, "it is over"
        segment = await store.segment("video_1", "reader", 0, 0)
        assert segment is not None and segment.data == made[0].data
        together = [made[1].data] if pacing is Pacing.NONE else []
        assert [one.data for one in segment.following] == together
        links = await store.links("video_1", 0, 9)
        assert [one.chunk for one in links] == [0, 1] and links[1].previous == links[0].signature

    in_store(tmp_path, work)


def test_a_session_goes_on_from_the_newest_of_chunks_that_came_together(tmp_path: Path) -> None:
    _, made = chunks()
    parts = [replace(made[0], chunk=number, first_pixel_frame=9 * number) for number in range(6)]

    async def work(store: Store) -> None:
        await put_video(store, video=replace(VIDEO, frames=99))
        for first, last, state in ((0, 1, b"a"), (1, 4, b"b"), (4, 6, b"c")):
            assert await store.put_chunks(PutChunks("video_1", 0, parts[first:last], state, first == 0))
        assert await store.snapshots("video_1") == [b"a", b"b", b"c"]
        video = await store.get("video_1")
        assert video is not None and (video.chunks_done, video.frames_done) == (6, 54)

    in_store(tmp_path, work)


def test_who_waits_for_a_chunk_is_told_when_it_comes(tmp_path: Path) -> None:
    init, made = chunks()

    async def work(store: Store) -> None:
        await put_video(store, init)
        waiting = asyncio.create_task(store.segment("video_1", "reader", 0, 600.0))
        await asyncio.sleep(0.05)
        await store.put_chunks(PutChunks("video_1", 0, [made[0]]))
        segment = await waiting
        assert segment is not None and segment.data == made[0].data

    in_store(tmp_path, work)


def test_who_waits_in_vain_is_told_so(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await put_video(store)
        segment = await store.segment("video_1", "reader", 0, 0.05)
        assert segment is not None and segment.data is None and segment.status is Status.IN_PROGRESS
        await store.end("video_1", Status.FAILED, "generation_failed", "...")
        segment = await store.segment("video_1", "reader", 0, 600.0)
        assert segment is not None and segment.status is Status.FAILED
        assert await store.segment("video_2", "reader", 0, 10.0) is None

    in_store(tmp_path, work)


def test_a_driver_learns_who_reads_and_that_it_was_replaced(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await put_video(store)
        assert (await store.check("video_1", 0)).readers == 0
        await store.segment("video_1", "reader", -1, 0)
        verdict = await store.check("video_1", 0)
        assert (verdict.go, verdict.readers, verdict.had_reader) == (True, 1, True)
        await store.leave("video_1", "reader")
        verdict = await store.check("video_1", 0)
        assert (verdict.readers, verdict.had_reader) == (0, True)
        await store.claim("video_1", "replica-1", 0)
        verdict = await store.check("video_1", 0)
        assert (verdict.go, verdict.superseded) == (False, True)

    in_store(tmp_path, work)


def test_a_reader_that_fell_silent_is_not_counted(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await put_video(store)
        await store.segment("video_1", "reader", -1, 0)
        await asyncio.sleep(0.05)
        assert (await store.check("video_1", 0)).readers == 0

    in_store(tmp_path, work, reader_silence_s=0.02)


def test_a_video_is_an_orphan_once_its_driver_is_silent_also_since_a_restart(tmp_path: Path) -> None:
    """After one its driver may still be there: it has as long to speak as ever."""

    async def judge(store: Store) -> None:
        video = await store.get("video_1")
        assert video is not None and not video.orphan
        store._driver_silence_s = 0.0
        video = await store.get("video_1")
        assert video is not None and video.orphan

    async def first(store: Store) -> None:
        await put_video(store)
        await judge(store)

    for work in (first, judge):
        in_store(tmp_path, work, driver_silence_s=60.0)


def test_a_video_whose_driver_let_go_is_an_orphan_at_once_and_not_lost(tmp_path: Path) -> None:
    """The upkeep may look before another gateway has taken it."""

    async def work(store: Store) -> None:
        store._started_at -= 3600.0
        await put_video(store)
        await store.check(VIDEO.id, 0)
        assert await store.orphans() == []
        await store.release(VIDEO.id, 0)
        assert [one.id for one in await store.orphans()] == [VIDEO.id]
        await store.sweep()
        video = await store.get(VIDEO.id)
        assert video is not None and (video.status, video.orphan) == (Status.IN_PROGRESS, True)

    in_store(tmp_path, work)


def test_nothing_is_remembered_of_videos_that_are_over(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await put_video(store)
        await store.segment("video_1", "reader", -1, 0)
        await store.end("video_1", Status.CANCELLED)
        await store.segment("video_1", "reader", 0, 0)
        await store.leave("video_1", "reader")
        await store.segment("video_9", "reader", 0, 0)
        assert not store._presences

    in_store(tmp_path, work)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MediaFiles(tmp_path)

    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError):
        files.put("video_1", {"0": b"data"})
    assert not (tmp_path / "video_1" / "0").exists()
