"""Snapshots: whole, versioned, of a size known by formula, and refused where they do not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from diagonal.config import Config
from diagonal.diffusion.rollout import KeptChunk, recache
from diagonal.engine.engine import Engine
from diagonal.engine.session import PromptChange
from diagonal.engine.snapshot import Identity, Snapshot, SnapshotError, increment_bytes, latents_bytes, merged
from diagonal.engine.specs import MAX_EVENTS, MAX_PENDING
from diagonal.errors import FieldError
from tests.engine.driving import CLEANER, OTHER, Clock, engine_of, equal, meanwhile, pull, spec_of, stream
from tests.networks import begun, caches_for, draw, small_causal, small_config, small_release


def same(one: Snapshot, other: Snapshot) -> bool:
    """Equal in every field, and latents bit for bit."""
    plain = {"kept": (), "history": None}
    if replace(one, **plain) != replace(other, **plain) or (one.history is None) != (other.history is None):  # type: ignore[arg-type]
        return False
    latents = [(a.written, b.written) for a, b in zip(one.kept, other.kept, strict=True)]
    if one.history is not None and other.history is not None:
        latents.append((one.history, other.history))
    places = [(item.chunk, item.level) for item in one.kept] == [(item.chunk, item.level) for item in other.kept]
    return places and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in latents)


def busy_engine(chunks: int = 6, **wish: Any) -> Engine:
    """A recorded session in a prompt change, with another one that waits."""
    engine = engine_of()
    stream(engine, spec_of(frames=None, record=True, **wish), chunks)
    engine.interact("s", PromptChange("e1", OTHER, 4))
    pull(engine)
    engine.interact("s", PromptChange("e2", "a red square", 2))
    return engine


def test_what_is_written_is_read_again_in_every_field() -> None:
    snapshot = busy_engine().snapshot("s")
    assert snapshot.timeline.done == 1 and snapshot.pending and snapshot.events and snapshot.kept
    assert same(Snapshot.from_bytes(snapshot.to_bytes()), snapshot)
    fresh = engine_of()
    fresh.open(spec_of())
    assert same(Snapshot.from_bytes(fresh.snapshot("s").to_bytes()), fresh.snapshot("s"))


def test_media_timeline_and_slack_go_along_and_refer_to_no_clock() -> None:
    clock, other = Clock(), Clock()
    engine, elsewhere = engine_of(clock=clock), engine_of(clock=other)
    results = stream(engine, spec_of(), 3)
    snapshot = results[-1].snapshot
    assert snapshot is not None and snapshot.ahead_s == 33 / 16
    assert (snapshot.media.chunks, snapshot.media.pixel_frames, snapshot.media.pts_s) == (3, 33, 33 / 16)
    other.now_s = 5e6
    elsewhere.restore(snapshot)
    assert elsewhere.info("s").ahead_s == 33 / 16
    elsewhere.close("s")
    elsewhere.step()
    elsewhere.restore(snapshot, ahead_s=0.25)
    assert elsewhere.info("s").ahead_s == 0.25


def test_the_snapshot_of_each_chunk_comes_with_it_and_goes_on_right_behind_it() -> None:
    plain, engine = stream(engine_of(), spec_of()), engine_of()
    results = stream(engine, spec_of(), 3)
    for result in results:
        elsewhere = engine_of()
        assert result.snapshot is not None
        elsewhere.restore(result.snapshot)
        assert equal([pull(elsewhere)], [plain[result.chunk + 1]])
    assert stream(engine_of(), spec_of(frames=9))[0].snapshot is None, "after the last chunk there is nothing to do"


def test_a_prompt_change_that_came_too_late_for_a_chunk_waits_in_its_snapshot() -> None:
    engine = engine_of()
    stream(engine, spec_of(), 1)
    change = PromptChange("e1", OTHER)
    meanwhile(engine, lambda: engine.interact("s", change))
    result = pull(engine)
    assert result.snapshot is not None and result.snapshot.pending == (change,) == engine.snapshot("s").pending


def test_a_snapshot_taken_while_a_chunk_is_made_is_that_of_the_chunk_before() -> None:
    engine, found = engine_of(), list[Snapshot]()
    stream(engine, spec_of(), 2)
    engine.interact("s", PromptChange("e1", OTHER))
    before = engine.snapshot("s")
    meanwhile(engine, lambda: found.append(engine.snapshot("s")))
    pull(engine)
    assert same(found[0], before) and found[0].pending[0].event_id == "e1"


def test_the_same_event_waits_only_once() -> None:
    engine = busy_engine()
    engine.interact("s", PromptChange("e2", "a red square", 2))
    assert len(engine.snapshot("s").pending) == 1


# Size


@pytest.mark.parametrize("settings", [(), CLEANER], ids=["reuse", "cleaner"])
def test_latents_have_the_size_of_the_formula_and_little_is_beside_them(settings: tuple[str, ...]) -> None:
    engine = engine_of(*settings)
    results = stream(engine, spec_of(frames=None), 12)
    snapshot = results[-1].snapshot
    assert snapshot is not None and snapshot.tensor_bytes == latents_bytes(engine.config)
    assert 0 < len(snapshot.to_bytes()) - snapshot.tensor_bytes < 4000
    grown = len(snapshot.to_bytes(since_chunk=10)) - len(snapshot.to_bytes(since_chunk=11))
    assert increment_bytes(engine.config) <= grown < increment_bytes(engine.config) + 200


def test_at_832x480_a_session_leaves_6_6_megabytes_and_1_2_for_each_further_chunk() -> None:
    config = Config()
    assert latents_bytes(config) == (9 + 24) * 16 * 60 * 104 * 2 == 6_589_440
    assert increment_bytes(config) == 2 * 3 * 16 * 60 * 104 * 2 == 1_198_080
    assert 2 * 30 * 1536 * 2 * 1560 * 12 == 3_450_470_400, "instead of its keys and values"


def test_keys_and_values_have_the_size_of_the_formula_to_the_byte() -> None:
    engine = engine_of()
    stream(engine, spec_of(frames=None), 9)
    layers, hidden, tokens, chunks, element = 2, 32, 18, 4, 4
    # the chunk in progress has its page too
    assert engine.info("s").cache_bytes == 2 * layers * hidden * tokens * chunks * element


@pytest.mark.parametrize("context", [0.0, 0.25, 0.9])
def test_a_bfloat16_network_reads_its_input_as_it_is_kept_so_that_nothing_is_lost(context: float) -> None:
    network = small_causal().to(torch.bfloat16)
    caches = caches_for(small_config(), network, 2)
    written, text = draw(4, 3, 4, 6), draw(1, 6, 16, seed=1)
    for cache, kept in zip(caches, (written, written.to(torch.bfloat16)), strict=True):
        recache(network, cache, [KeptChunk(0, kept, context)], text)
    pool = caches[0].pool
    for part in (pool.keys, pool.values):
        assert torch.equal(part[:, caches[0].pages[0]], part[:, caches[1].pages[0]]) and bool(part.any())
    assert begun(1, caches[0]).context_chunks == 1


def test_a_bfloat16_session_keeps_its_latents_in_bfloat16_and_is_restored_bit_for_bit() -> None:
    def engine() -> Engine:
        release = small_release("model.compute_dtype=bfloat16")
        release.network.to(torch.bfloat16)
        return engine_of(release=release)

    plain, found = stream(engine(), spec_of()), stream(engine(), spec_of(), 3)
    snapshot = found[-1].snapshot
    assert snapshot is not None and snapshot.history is not None
    assert {part.dtype for part in (snapshot.history, snapshot.kept[0].written)} == {torch.bfloat16}
    elsewhere = engine()
    elsewhere.restore(Snapshot.from_bytes(snapshot.to_bytes()))
    assert equal([pull(elsewhere) for _ in range(4)], plain[3:])


def test_a_log_and_a_queue_of_changes_are_bounded() -> None:
    engine = engine_of()
    stream(engine, spec_of(record=True), 1)
    for number in range(MAX_PENDING):
        engine.interact("s", PromptChange(f"e{number}", OTHER))
    with pytest.raises(FieldError, match="event_id = 'one more': allowed is one of at most 64 that wait"):
        engine.interact("s", PromptChange("one more", OTHER))
    session = engine.table.sessions["s"]
    for _ in range(2 * MAX_EVENTS):
        session.log("prompt")
    assert len(session.events) == MAX_EVENTS
    with pytest.raises(FieldError, match="session = 's': allowed is one of fewer than 4096 events"):
        engine.recording("s")


# Increments


@pytest.mark.parametrize("settings", [(), CLEANER], ids=["reuse", "cleaner"])
def test_increments_behind_a_whole_snapshot_give_the_newest_one(settings: tuple[str, ...]) -> None:
    engine = engine_of(*settings)
    parts, since = [], -1
    for result in stream(engine, spec_of(frames=None, record=True), 11):
        assert result.snapshot is not None
        if result.chunk % 2 == 0:  # every second one is lost
            parts.append(result.snapshot.to_bytes(since))
            since = result.chunk
            assert same(merged(parts), result.snapshot)
    assert max(len(part) for part in parts[1:]) < len(merged(parts).to_bytes()) * 0.6


def test_an_increment_is_refused_without_the_snapshot_before_it() -> None:
    results = stream(engine_of(), spec_of(frames=None), 4)
    snapshots = [result.snapshot for result in results if result.snapshot]
    data = snapshots[3].to_bytes(since_chunk=2)
    other = engine_of()
    stream(other, spec_of("other"), 3)
    for base in (None, snapshots[1], snapshots[3], other.snapshot("other")):
        with pytest.raises(SnapshotError, match="since_chunk = 2: needed is the same session's snapshot"):
            Snapshot.from_bytes(data, base)
    with pytest.raises(SnapshotError, match="there is none"):
        merged([])


# Refusals


def changed(data: bytes, **fields: Any) -> bytes:
    """The same snapshot with other fields in its header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["diagonal_snapshot"])
    metadata = {"diagonal_snapshot": json.dumps(header | fields)}
    return safetensors.torch.save(safetensors.torch.load(data), metadata=metadata)


def test_another_version_of_the_schema_is_refused() -> None:
    with pytest.raises(SnapshotError, match="snapshot.schema = 2: allowed is 1"):
        Snapshot.from_bytes(changed(busy_engine().snapshot("s").to_bytes(), schema=2))


@pytest.mark.parametrize("cut", [0, 4, 8, 100, 3000, -1])
def test_a_broken_snapshot_is_refused_as_such(cut: int) -> None:
    with pytest.raises(SnapshotError, match="snapshot"):
        Snapshot.from_bytes(busy_engine().snapshot("s").to_bytes()[:cut])


@pytest.mark.parametrize("data", [b"\x80\x04K\x01.", b"{}", safetensors.torch.save({"history": torch.zeros(2)})])
def test_what_is_no_snapshot_is_refused_and_no_pickle_is_ever_opened(data: bytes) -> None:
    with pytest.raises(SnapshotError, match="it has no header"):
        Snapshot.from_bytes(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"spec": {"session_id": "s"}},
        {"timeline": 3},
        {"kept": [[0, 0.5]]},
        {"kept": [["x"]]},
        {"drift": {}},
        {"drift": {"chunks": 1, "reference": {"x": 1}, "smoothed": {}}},
        {"history_frames": 999},
        {"since_chunk": "x"},
        {"media": {"chunks": 9, "pixel_frames": 1, "fps": 16}},
        {"next_chunk": 3},
        {"next_chunk": 0},
    ],
)
def test_a_header_that_does_not_fit_is_refused_before_a_session_is_held(fields: dict[str, Any]) -> None:
    data = changed(busy_engine().snapshot("s").to_bytes(), **fields)
    engine = engine_of()
    with pytest.raises(SnapshotError):
        engine.restore(Snapshot.from_bytes(data))
    assert engine.stats().active_sessions == 0


def test_latents_of_another_geometry_are_refused() -> None:
    snapshot = busy_engine().snapshot("s")
    assert snapshot.history is not None
    wrong = [
        replace(snapshot, history=snapshot.history[:, :, :2]),
        replace(snapshot, history=None),
        replace(snapshot, kept=tuple(replace(item, written=item.written[:2]) for item in snapshot.kept)),
        replace(snapshot, kept=snapshot.kept[::-1]),
        replace(snapshot, kept=(replace(snapshot.kept[0], chunk=1), *snapshot.kept)),
    ]
    engine = engine_of()
    for other in wrong:
        with pytest.raises(SnapshotError, match="snapshot.(kept|history)"):
            engine.restore(other)


def test_another_release_or_configuration_is_refused_and_other_limits_are_not() -> None:
    snapshot = busy_engine().snapshot("s")
    named, retrained = small_release(), small_release()
    named.name = "other"
    retrained.manifest = {"files": {"transformer/x": {"sha256": "00"}}}
    for release, part in (
        (named, "release"),
        (retrained, "content"),
        (small_release("schedule.shift=3"), "config"),
        (small_release("cache.window_frames=15"), "config"),
    ):
        with pytest.raises(SnapshotError, match=f"snapshot.identity.{part} = "):
            engine_of(release=release).restore(snapshot)
    engine_of("serve.max_sessions=2", "serve.max_seconds=9", "train.workers=5").restore(snapshot)


def test_the_embedded_release_has_an_identity() -> None:
    from diagonal.model.release import Release

    identity = Identity.of(Release.load())
    assert len(identity.content) == len(identity.config) == 32 and identity.content != identity.config


def test_a_session_that_was_over_is_refused() -> None:
    results = stream(engine_of(), spec_of(frames=21))
    assert results[0].snapshot is not None
    short = replace(results[0].snapshot, spec=spec_of(frames=9))
    with pytest.raises(SnapshotError, match="next_chunk = 1: allowed is one below 1"):
        engine_of().restore(short)
