"""A replica over a real engine of a small model: pauses, hand-overs without a gap, refusals by budget, readiness."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import av
import pytest

from diagonal.engine.engine import Engine
from diagonal.metrics import MetricsBackend
from serve.records import EncodedChunk, Opened, OpenSession, Refused
from serve.replica.replica import Replica
from serve.settings import ServeSettings
from tests.networks import SmallRelease, small_release
from tests.recorded_metrics import RecordedMetrics

PROMPT, OTHER = "a red circle moves left", "a blue square moves right"
DEADLINE_S = 60.0


def run(tmp_path: Path, work: Callable[[Callable[..., Replica]], Awaitable[None]]) -> None:
    """Run `work` with a maker of replicas on one loop, and end them all."""
    settings, made = ServeSettings(data=str(tmp_path)), list[Replica]()

    def make(release: SmallRelease | None = None, **engine: Any) -> Replica:
        release = release or small_release()

        def load(_: ServeSettings, metrics: MetricsBackend) -> Any:
            return release.name, release.config, Engine(release, metrics=metrics, **engine)

        made.append(Replica(settings, load, RecordedMetrics(), f"replica-{len(made) + 1}"))
        return made[-1]

    async def all_of_it() -> None:
        try:
            await asyncio.wait_for(work(make), DEADLINE_S)
        finally:
            for replica in made:
                await replica.shut()

    asyncio.run(all_of_it())


async def pull(replica: Replica, chunk: int, session_id: str = "v", since: int | None = None) -> EncodedChunk:
    made = await replica.pull(session_id, chunk, 0, since)
    assert isinstance(made, tuple) and len(made) == 1, made
    return made[0]


async def frames_of(replica: Replica, chunks: int, **wish: Any) -> list[bytes]:
    """The stream of a session: initialisation segment and chunks."""
    opened = await replica.open(OpenSession("v", PROMPT, 3, wish.get("frames", 81), 2))
    assert isinstance(opened, Opened)
    return [opened.init, *[(await pull(replica, chunk)).data for chunk in range(chunks)]]


def decoded(parts: list[bytes]) -> tuple[list[Any], list[int]]:
    """Pictures and presentation times of a stream, in the order in which it brings them."""
    with av.open(io.BytesIO(b"".join(parts)), mode="r") as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [int(frame.pts or 0) for frame in frames]


async def settled(condition: Callable[[], bool]) -> None:
    late_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < late_s, "not within 10 s"
        await asyncio.sleep(0.01)


def test_a_paused_session_frees_its_cache_and_goes_on_with_the_same_stream(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        replica, plain = make(), make()
        expected = await frames_of(plain, 7)
        found = await frames_of(replica, 2)
        assert await replica.pause("v") is None
        engine = replica._engine
        await settled(lambda: engine.stats().paused_sessions == 1)
        assert engine.stats().cache_bytes == 0 and engine.stats().free_slots == 4
        waiting = asyncio.create_task(pull(replica, 2))
        await asyncio.sleep(0.2)
        assert not waiting.done(), "a chunk that is asked for meanwhile comes later"
        assert await replica.resume("v") is None
        found.append((await waiting).data)
        found += [(await pull(replica, chunk)).data for chunk in range(3, 7)]
        assert found[:3] == expected[:3]  # init segment and the chunks before the pause: to the byte
        (pictures, times), (wanted, wanted_times) = decoded(found), decoded(expected)
        assert times == wanted_times
        # Its cache was written anew: the same sums in another order, which differ by a last bit on some processors.
        assert max(abs(a.astype(int) - b.astype(int)).max() for a, b in zip(pictures, wanted, strict=True)) <= 8

    run(tmp_path, work)


@pytest.mark.slow
def test_a_session_goes_on_at_another_replica_with_no_frame_twice_and_none_missing(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        first, second, plain = make(), make(), make()
        expected = await frames_of(plain, 7)
        found = await frames_of(first, 3)
        parts = [(await pull(first, 2, since=-1)).snapshot]
        await pull(first, 3)  # made, and lost with the replica
        await first.close("v", "lost")
        opened = await second.restore(parts, 2, ahead_s=0.5)
        assert isinstance(opened, Opened) and opened.init == found[0] and opened.replica == "replica-2"
        rest = [await pull(second, chunk) for chunk in range(3, 7)]
        assert [made.first_pixel_frame for made in rest] == [33, 45, 57, 69] and rest[-1].last
        pictures, times = decoded(found + [made.data for made in rest])
        wanted, wanted_times = decoded(expected)
        assert times == wanted_times == [n * times[1] for n in range(81)]
        assert max(abs(a.astype(int) - b.astype(int)).max() for a, b in zip(pictures, wanted, strict=True)) <= 24

    run(tmp_path, work)


def test_increments_of_each_chunk_are_enough_to_go_on(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        first, second = make(), make()
        await first.open(OpenSession("v", PROMPT, 3, 200, 1))
        parts: list[bytes] = []
        for chunk in range(7):
            parts.append((await pull(first, chunk, since=chunk - 1)).snapshot)
        assert isinstance(await second.restore(parts, 1), Opened)
        assert (await pull(second, 7)).first_pixel_frame == 81
        assert len(parts[6]) < len((await pull(first, 6, since=-1)).snapshot), "a part brings what a chunk added alone"
        assert await first.pull("v", 2) == Refused("chunk_gone", "chunk 2 was given up")

    run(tmp_path, work)


def test_a_pull_brings_what_is_there_and_a_session_goes_on_from_the_newest_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.replica.replica._LINGER_S", DEADLINE_S)

    async def work(make: Callable[..., Replica]) -> None:
        first, second = make(), make()
        await first.open(OpenSession("v", PROMPT, 3, 81, 1))
        whole = await pull(first, 0, since=-1)
        made = await first.pull("v", 1, 2, 0)
        assert isinstance(made, tuple) and [one.chunk for one in made] == [1, 2, 3]
        assert [bool(one.snapshot) for one in made] == [False, False, True]
        assert (await pull(first, 1)).data == made[0].data, "the answer was lost"
        assert isinstance(await second.restore([whole.snapshot, made[-1].snapshot], 1), Opened)
        assert (await pull(second, 4)).first_pixel_frame == 45
        ended = await first.pull("v", 4, 8)
        assert isinstance(ended, tuple) and [one.chunk for one in ended] == [4, 5, 6] and ended[-1].last

    run(tmp_path, work)


def test_a_snapshot_that_does_not_fit_is_refused_and_takes_no_slot(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        first, other = make(), make(small_release("schedule.shift=3"))
        await frames_of(first, 1)
        data = (await pull(first, 0, since=-1)).snapshot
        for replica, parts in ((other, [data]), (first, [b"\x80\x04K\x01."]), (first, [])):
            refused = await replica.restore(parts, 1)
            assert isinstance(refused, Refused) and refused.code == "snapshot_refused"
        assert other._engine.stats().active_sessions == 0

    run(tmp_path, work)


def test_a_session_that_would_slow_others_down_is_refused_with_a_time(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        replica = make(small_release("serve.budget_share=0.000001"))
        assert isinstance(await replica.open(OpenSession("v", PROMPT, 3, 81, 1, True)), Opened)
        await pull(replica, 0)
        refused = await replica.open(OpenSession("w", PROMPT, 3, 81, 1, True))
        assert isinstance(refused, Refused) and refused.code == "server_full"
        assert refused.retry_after_s is not None and 1.0 <= refused.retry_after_s <= 60.0
        assert refused.reason == "budget"
        assert isinstance(await replica.open(OpenSession("x", PROMPT, 3, 81, 1)), Opened), "nobody watches it"

    run(tmp_path, work)


def test_a_resume_without_room_says_so_and_pauses_of_nothing_are_refused(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        replica = make(small_release("serve.max_sessions=1"))
        await frames_of(replica, 1)
        await replica.pause("v")
        await settled(lambda: replica._engine.stats().free_slots == 1)
        await replica.open(OpenSession("w", PROMPT, 3, 9, 1))
        refused = await replica.resume("v")
        assert isinstance(refused, Refused) and refused.code == "server_full" and refused.retry_after_s
        await replica.pull("w", 0)
        over = await replica.pause("w")
        assert isinstance(over, Refused) and over.code == "session_over"
        unknown = await replica.pause("x")
        assert isinstance(unknown, Refused) and unknown.code == "session_lost"

    run(tmp_path, work)


@pytest.mark.slow
def test_a_replica_is_ready_when_its_engine_makes_chunks_and_not_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.replica.replica._PROOF_AGE_S", 0.2)

    async def work(make: Callable[..., Replica]) -> None:
        release = small_release()
        replica = make(release)
        await asyncio.sleep(0.3)
        assert await replica.ready()
        replica.check_health()

        def refuse(module: Any, inputs: Any) -> None:
            raise RuntimeError("the device is gone")

        release.network.register_forward_pre_hook(refuse)
        await asyncio.sleep(0.3)
        assert not await replica.ready()
        for number in range(2):
            assert isinstance(await replica.open(OpenSession(f"bad{number}", PROMPT, 3, 9, 1)), Opened)
            failed = await replica.pull(f"bad{number}", 0)
            assert isinstance(failed, Refused) and failed.code == "generation_failed"
        await settled(lambda: not replica._thread.healthy)
        assert replica._thread.alive
        unwell = await replica.open(OpenSession("next", PROMPT, 3, 9, 1))
        assert isinstance(unwell, Refused) and unwell.code == "replica_unwell" and unwell.retry_after_s
        with pytest.raises(RuntimeError, match="three chunks in a row"):
            replica.check_health()
        assert not await replica.ready()

    run(tmp_path, work)


def test_a_session_paused_for_too_long_is_ended_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.replica.replica._REAP_EVERY_S", 0.05)

    async def work(make: Callable[..., Replica]) -> None:
        replica = make(small_release("serve.max_paused_s=0.4"))
        await frames_of(replica, 1)
        await replica.open(OpenSession("w", PROMPT, 3, 81, 1))
        await replica.pause("v")
        await asyncio.sleep(0.2)
        assert set(replica._slots) == {"v", "w"}
        await settled(lambda: set(replica._slots) == {"w"})

    run(tmp_path, work)


def test_a_first_chunk_waits_for_no_other_encoding(tmp_path: Path) -> None:
    async def work(make: Callable[..., Replica]) -> None:
        replica, busy = make(), threading.Event()
        try:
            for _ in range(ServeSettings.encode_threads):
                replica._pool.submit(busy.wait, DEADLINE_S)
            await replica.open(OpenSession("v", PROMPT, 3, 81, 2))
            assert (await pull(replica, 0)).frames == 9
            assert await replica.pull("v", 1, wait_s=0.5) is None, "a later one waits for its turn"
        finally:
            busy.set()
        assert (await pull(replica, 1)).frames == 12

    run(tmp_path, work)
