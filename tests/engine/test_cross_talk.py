"""Threat 4: nothing of one session reaches another, through memory that was used before or through what they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagonal.engine.engine import Engine
from tests.engine.driving import OTHER, PROMPT, engine_of, equal, pull, spec_of, stream
from tests.networks import SmallRelease, decoder_of, small_release, small_vae

CHUNKS = 7  # more than the window holds: eviction, too


def release_of(codec: str, *settings: str) -> SmallRelease:
    release = small_release("serve.max_sessions=1", *settings)
    if codec == "wan":
        release.codec = decoder_of(small_vae())
    return release


def poison(engine: Engine, value: float) -> int:
    """Write `value` into every page that no session holds, as if its last owner had left it there; how many."""
    held = {page for session in engine.table.sessions.values() for page in session.cache.pages}
    free = torch.tensor([page for page in range(engine.maker.pool.pages) if page not in held])
    for memory in (engine.maker.pool.keys, engine.maker.pool.values):
        memory[:, free] = value
    return len(free)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["linear", "wan"])
@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_a_session_in_anothers_slot_makes_the_pixels_of_a_fresh_engine(codec: str, value: float) -> None:
    fresh = stream(engine_of(release=release_of(codec)), spec_of("b", frames=None, seed=5), CHUNKS)
    engine = engine_of(release=release_of(codec))
    stream(engine, spec_of("a", frames=None, prompt=OTHER), CHUNKS)
    engine.close("a")
    engine.step()
    assert poison(engine, value) == engine.maker.pool.pages
    assert equal(stream(engine, spec_of("b", frames=None, seed=5), CHUNKS), fresh)


def test_poison_in_a_page_that_is_read_would_be_seen() -> None:
    """What the test before relies on: the poison reaches the pixels where it is read."""
    engine = engine_of(release=release_of("linear"))
    expected = stream(engine_of(release=release_of("linear")), spec_of(), 3)
    stream(engine, spec_of(), 2)
    (session,) = engine.table.sessions.values()
    engine.maker.pool.values[:, session.cache.pages[0]] = 1e4
    assert not equal([pull(engine)], expected[2:])


def test_an_owner_writes_his_own_pages_and_no_other_ones() -> None:
    engine = engine_of("serve.max_sessions=3")
    names = "abc"
    for name in names:
        stream(engine, spec_of(name, frames=None, seed=ord(name)), 1)
    for turn in range(3 * CHUNKS):
        name = names[turn % 3]
        before = [memory.clone() for memory in (engine.maker.pool.keys, engine.maker.pool.values)]
        pull(engine, name)
        pages = {one: set(engine.table.sessions[one].cache.pages) for one in names}
        assert sum(map(len, pages.values())) == len(set.union(*pages.values())), "no page has two owners"
        others = torch.tensor([page for page in range(engine.maker.pool.pages) if page not in pages[name]])
        for memory, old in zip((engine.maker.pool.keys, engine.maker.pool.values), before, strict=True):
            assert torch.equal(memory[:, others], old[:, others])


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["linear", "wan"])
def test_sessions_that_take_turns_make_what_each_makes_alone(codec: str) -> None:
    """Caches, decoders and texts side by side, one forward each: bit for bit."""

    def engine() -> Engine:
        release = small_release("serve.max_sessions=2")
        if codec == "wan":
            release.codec = decoder_of(small_vae())
        return engine_of(release=release)

    specs = [spec_of("a", frames=None, seed=1), spec_of("b", frames=None, seed=2, prompt=OTHER)]
    alone = [stream(engine(), spec, CHUNKS) for spec in specs]
    shared = engine()
    together = [stream(shared, spec, 1) for spec in specs]
    for _ in range(CHUNKS - 1):
        for spec, results in zip(specs, together, strict=True):
            results.append(pull(shared, spec.session_id))
    assert equal(together[0], alone[0]) and equal(together[1], alone[1])


def test_what_is_not_finite_in_a_session_reaches_no_other_of_its_forward() -> None:
    def two() -> Engine:
        engine = engine_of("serve.max_sessions=2")
        for name, prompt in (("a", PROMPT), ("b", OTHER)):
            stream(engine, spec_of(name, frames=None, seed=3, prompt=prompt), 2)
        return engine

    def step(engine: Engine) -> dict[str, Any]:
        for name in "ab":
            engine.request(name)
        return {result.session_id: result for result in engine.step()}

    clean, poisoned = two(), two()
    poisoned.maker.pool.values[:, poisoned.table.sessions["a"].cache.pages[0]] = float("nan")
    expected, found = step(clean), step(poisoned)
    assert found["a"].code == "not_finite"
    assert torch.equal(found["b"].pixels, expected["b"].pixels)
