"""Going on elsewhere: a snapshot, another engine, and how much of the difference can be seen."""

from __future__ import annotations

import pytest
import torch

from diagonal.engine.engine import CapacityError, Engine
from diagonal.engine.session import PromptChange
from diagonal.engine.snapshot import Snapshot
from diagonal.errors import FieldError
from tests.engine.driving import CLEANER, OTHER, BreakingDecoder, engine_of, equal, pull, spec_of, stream
from tests.networks import small_release


def moved(engine: Engine, *settings: str) -> tuple[Engine, int]:
    """A fresh engine that went on with the session, and the size of what was handed over."""
    data = engine.snapshot("s").to_bytes()
    engine.close("s")
    engine.step()
    elsewhere = engine_of(*settings)
    elsewhere.restore(Snapshot.from_bytes(data))
    return elsewhere, len(data)


@pytest.mark.parametrize("settings", [(), CLEANER], ids=["reuse", "cleaner"])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_before_the_first_eviction_a_session_goes_on_elsewhere_with_the_same_pixels(
    chunks: int, settings: tuple[str, ...]
) -> None:
    plain, engine = stream(engine_of(*settings), spec_of()), engine_of(*settings)
    stream(engine, spec_of(), chunks)
    elsewhere, _ = moved(engine, *settings)
    assert equal([pull(elsewhere) for _ in range(7 - chunks)], plain[chunks:])
    assert elsewhere.stats().active_sessions == 1


def test_after_eviction_it_goes_on_with_a_measured_seam() -> None:
    """The re-cache no longer sees what was evicted: 0.26 of 255 on average in the first chunk here, stated at 1."""
    plain, engine = stream(engine_of(), spec_of(frames=129)), engine_of()
    stream(engine, spec_of(frames=129), 7)
    elsewhere, _ = moved(engine)
    found = [pull(elsewhere) for _ in range(4)]
    assert [result.first_pixel_frame for result in found] == [81, 93, 105, 117] and found[-1].last
    pairs = zip(found, plain[7:], strict=True)
    seam = [float((after.pixels.float() - before.pixels.float()).abs().mean()) for after, before in pairs]
    assert 0.0 < max(seam) < 1.0
    assert plain[7].pixels.float().std() > 10


def test_a_prompt_change_under_way_and_one_that_waits_go_along() -> None:
    def steer(engine: Engine) -> Engine:
        stream(engine, spec_of(), 1)
        engine.interact("s", PromptChange("e1", OTHER, 3))
        pull(engine)
        return engine

    stays, moves = steer(engine_of()), steer(engine_of())
    moves.interact("s", PromptChange("e2", "a red square"))
    elsewhere, _ = moved(moves)
    stays.interact("s", PromptChange("e2", "a red square"))
    found, expected = pull(elsewhere), pull(stays)
    assert found.applied_event_ids == expected.applied_event_ids == ("e2",)
    assert torch.equal(found.pixels, expected.pixels)
    stays, elsewhere = steer(engine_of()), moved(steer(engine_of()))[0]
    assert equal([pull(elsewhere) for _ in range(2)], [pull(stays) for _ in range(2)])


def test_a_snapshot_holds_no_latents_of_the_sessions_beside_it() -> None:
    engine = engine_of()
    for number in range(4):
        engine.open(spec_of(str(number)))
    for _ in range(5):
        for number in range(4):
            engine.request(str(number))
        engine.step()
    snapshot = engine.snapshot("0")
    assert snapshot.history is not None
    for part in (snapshot.history, *(item.written for item in snapshot.kept)):
        assert part.untyped_storage().nbytes() == part.nbytes


def test_a_session_that_has_not_begun_goes_on_elsewhere_and_one_that_ended_does_not() -> None:
    engine = engine_of()
    engine.open(spec_of(frames=9))
    engine.interact("s", PromptChange("e1", OTHER))
    elsewhere, size = moved(engine)
    first = pull(elsewhere)
    assert torch.equal(first.pixels, stream(engine_of(), spec_of(frames=9, prompt=OTHER))[0].pixels)
    assert first.applied_event_ids == ("e1",) and size < 3000
    with pytest.raises(FieldError, match="session = 's'.*has not ended"):
        elsewhere.snapshot("s")


def test_an_engine_that_is_full_takes_no_session_over() -> None:
    engine, full = engine_of(), engine_of("serve.max_sessions=1")
    stream(engine, spec_of(), 2)
    full.open(spec_of("other"))
    with pytest.raises(CapacityError):
        full.restore(engine.snapshot("s"))
    assert full.stats().active_sessions == 1


def test_a_session_that_cannot_be_restored_fails_and_leaves_its_slot_free() -> None:
    engine = engine_of()
    stream(engine, spec_of(), 2)
    snapshot = engine.snapshot("s")
    release = small_release()
    release.codec = BreakingDecoder(release.codec, fails_on=1)
    broken = engine_of(release=release)
    broken.restore(snapshot)
    failed = pull(broken)
    assert (failed.error, failed.code, failed.chunk) == ("the decoder gave up", "decode_failed", 2)
    assert broken.stats().active_sessions == broken.stats().cache_bytes == 0
    broken.restore(snapshot)
    assert torch.equal(pull(broken).pixels, pull(engine).pixels)
