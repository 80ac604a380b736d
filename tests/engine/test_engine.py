"""The engine: exact counts, prompt changes at the next chunk, isolation, order, and going on elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.diffusion.rollout import rollout
from diagonal.engine.engine import CapacityError, Engine
from diagonal.engine.session import ChunkResult, PromptChange, SessionSpec
from diagonal.errors import FieldError
from diagonal.metrics import NullSink
from diagonal.model.vae import Decoder, DecoderState
from tests.networks import SmallRelease, small_release

PROMPT = "a red circle moves left"
OTHER = "a blue square moves right"


class Sink(NullSink):
    """Checks names as `NullSink` does, and keeps sums and last values."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.gauges: dict[str, float] = {}

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        super().inc(name, value, **labels)
        self.totals[name] = self.totals.get(name, 0.0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        super().set(name, value, **labels)
        self.gauges[name] = value


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def engine_of(*settings: str, release: SmallRelease | None = None, **parts: Any) -> Engine:
    return Engine(release or small_release(*settings), **parts)  # type: ignore[arg-type]


def spec_of(
    session_id: str = "s", *, frames: int | None = 81, prompt: str = PROMPT, seed: int = 3, schedule: str | None = None
) -> SessionSpec:
    return SessionSpec(session_id, prompt, seed, frames, schedule)


def pull(engine: Engine, session_id: str = "s") -> ChunkResult:
    """The session's next chunk."""
    engine.request(session_id)
    (result,) = engine.step()
    assert result.session_id == session_id
    return result


def stream(engine: Engine, spec: SessionSpec, chunks: int | None = None) -> list[ChunkResult]:
    """Open a session and pull that many chunks, or all."""
    engine.open(spec)
    results = [pull(engine, spec.session_id)]
    while not results[-1].last and (chunks is None or len(results) < chunks):
        results.append(pull(engine, spec.session_id))
    return results


def equal(one: Sequence[ChunkResult], other: Sequence[ChunkResult]) -> bool:
    """The same chunks with the same pixels, bit for bit."""
    return [r.chunk for r in one] == [r.chunk for r in other] and all(
        torch.equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True)
    )


# What comes out


@pytest.mark.parametrize(("frames", "chunks"), [(1, 1), (9, 1), (10, 2), (81, 7), (82, 8)])
def test_any_number_of_frames_comes_out_exactly(frames: int, chunks: int) -> None:
    engine = engine_of(metrics=(sink := Sink()))
    results = stream(engine, spec_of(frames=frames))
    assert [result.chunk for result in results] == list(range(chunks))
    assert [result.last for result in results] == [False] * (chunks - 1) + [True]
    assert sum(len(result.pixels) for result in results) == frames == sink.totals["diagonal_frames_generated_total"]
    assert [result.first_pixel_frame for result in results] == [0, 9, 21, 33, 45, 57, 69, 81][:chunks]
    assert all(r.pixels.shape[1:] == (32, 48, 3) and r.pixels.dtype == torch.uint8 for r in results)
    engine.request("s")
    assert engine.step() == [], "a session that is done makes nothing more"


def test_surplus_frames_are_dropped_from_the_end_of_the_last_chunk() -> None:
    short, long = stream(engine_of(), spec_of(frames=10)), stream(engine_of(), spec_of(frames=21))
    assert torch.equal(short[0].pixels, long[0].pixels)
    assert len(short[1].pixels) == 1 and torch.equal(short[1].pixels, long[1].pixels[:1])


def test_a_stream_is_the_rollout_of_its_seed_decoded() -> None:
    release = small_release()
    results = stream(engine_of(release=release), spec_of())
    clean = rollout(release.network, release.config, release.encoder.encode([PROMPT]), [3]).clean
    assert torch.equal(torch.cat([result.pixels for result in results]), release.codec.decode_clip(clean)[0])
    assert sum(result.forwards for result in results) == 17


def test_a_chunk_made_again_on_a_fresh_engine_is_bit_equal() -> None:
    first = stream(engine_of(), spec_of())
    assert equal(stream(engine_of(), spec_of()), first)
    assert not equal(stream(engine_of(), spec_of(seed=4)), first)
    assert not equal(stream(engine_of(), spec_of(prompt=OTHER)), first)


def test_an_endless_stream_goes_on_in_the_memory_of_its_window() -> None:
    engine = engine_of()
    results = stream(engine, spec_of(frames=None), 12)
    assert len(results) == 12 and not results[-1].last and len(results[-1].pixels) == 12
    assert engine.stats().cache_bytes == engine.stats().cache_capacity_bytes // 4


def test_a_session_may_run_another_schedule_under_the_releases_own_context() -> None:
    assert [r.forwards for r in stream(engine_of(), spec_of(schedule="32"), 3)] == [3, 2, 2]
    level = engine_of("schedule.context=0.1")
    assert [r.forwards for r in stream(level, spec_of(schedule="32"), 3)] == [4, 3, 3]
    assert [r.forwards for r in stream(level, spec_of("t", schedule="1"), 2)] == [2, 2]
    with pytest.raises(FieldError, match="schedule.context"):
        engine_of().open(spec_of(schedule="1"))
    with pytest.raises(FieldError, match="schedule.steps = '9'"):
        engine_of().open(spec_of(schedule="9"))


# Prompt changes


def test_a_prompt_change_applies_at_the_next_chunk_and_is_reported_there_once() -> None:
    plain, engine = stream(engine_of(), spec_of()), engine_of(metrics=(sink := Sink()))
    changed = stream(engine, spec_of(), 3)
    engine.interact("s", PromptChange("e1", OTHER))
    changed += [pull(engine) for _ in range(4)]
    assert [result.applied_event_ids for result in changed] == [(), (), (), ("e1",), (), (), ()]
    assert equal(changed[:3], plain[:3])
    assert all(not torch.equal(a.pixels, b.pixels) for a, b in zip(changed[3:], plain[3:], strict=True))
    assert changed[3].forwards == 2 and sink.totals["diagonal_model_forward_calls_total"] == 17 + 3


def test_a_change_to_the_same_prompt_changes_no_pixel_before_the_first_eviction() -> None:
    plain, engine = stream(engine_of(), spec_of()), engine_of()
    changed = stream(engine, spec_of(), 2)
    engine.interact("s", PromptChange("e1", PROMPT))
    changed += [pull(engine) for _ in range(2)]
    assert changed[2].applied_event_ids == ("e1",) and equal(changed, plain[:4])


def test_of_several_changes_before_a_chunk_the_last_holds_and_all_are_reported() -> None:
    engine, direct = engine_of(), engine_of()
    stream(engine, spec_of(), 1)
    stream(direct, spec_of(), 1)
    for number, prompt in enumerate(("a", "a blue circle", OTHER)):
        engine.interact("s", PromptChange(f"e{number}", prompt))
    direct.interact("s", PromptChange("e", OTHER))
    result = pull(engine)
    assert result.applied_event_ids == ("e0", "e1", "e2")
    assert torch.equal(result.pixels, pull(direct).pixels)


def test_a_change_before_the_first_chunk_is_in_it() -> None:
    engine = engine_of()
    engine.open(spec_of())
    engine.interact("s", PromptChange("e1", OTHER))
    first = pull(engine)
    assert first.applied_event_ids == ("e1",)
    assert torch.equal(first.pixels, stream(engine_of(), spec_of(prompt=OTHER), 1)[0].pixels)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_transition_takes_so_many_chunks_with_a_recache_at_each(chunks: int) -> None:
    release = small_release()
    engine = engine_of(release=release)
    start, target = release.encoder.encode([PROMPT]), release.encoder.encode([OTHER])
    stream(engine, spec_of(), 2)
    engine.interact("s", PromptChange("e1", OTHER, chunks))
    total = max(1, chunks)
    for done in range(1, total + 2):
        pull(engine)
        expected = torch.lerp(start, target, min(1.0, done / total))
        torch.testing.assert_close(engine.snapshot("s").text, expected, rtol=0, atol=1e-6)
    recaches = [event.chunk for event in engine.snapshot("s").events if event.kind == "recache"]
    assert recaches == list(range(2, 2 + total))
    assert torch.equal(engine.snapshot("s").text, target)
    (prompt,) = [event for event in engine.snapshot("s").events if event.kind == "prompt"]
    assert (prompt.chunk, prompt.detail["prompt"], prompt.detail["transition_chunks"]) == (2, OTHER, chunks)


# Slots


def test_no_more_sessions_are_taken_than_there_are_slots_and_the_error_says_when_to_ask() -> None:
    engine = engine_of("serve.max_sessions=2")
    for name in ("a", "b"):
        engine.open(spec_of(name))
    with pytest.raises(CapacityError, match="all 2 session slots") as full:
        engine.open(spec_of("c"))
    assert full.value.retry_after_s >= 1.0
    assert engine.stats().free_slots == 0
    engine.close("a")
    engine.step()
    engine.open(spec_of("c"))


def test_an_id_in_use_is_refused_and_one_that_is_free_again_is_taken() -> None:
    engine = engine_of()
    engine.open(spec_of())
    with pytest.raises(FieldError, match="session_id = 's': allowed is an id that is not in use"):
        engine.open(spec_of())
    engine.close("s")
    engine.step()
    engine.open(spec_of())


def test_an_unknown_session_is_a_key_error_and_closing_it_is_nothing() -> None:
    engine = engine_of()
    for call in (lambda: engine.request("x"), lambda: engine.interact("x", PromptChange("e", "a")),
                 lambda: engine.snapshot("x")):  # fmt: skip
        with pytest.raises(KeyError):
            call()
    engine.close("x")
    assert engine.step() == []


def test_closing_frees_the_cache_within_one_step_and_leaves_the_others_alone() -> None:
    engine = engine_of(metrics=(sink := Sink()))
    alone = stream(engine_of(), spec_of("b"), 4)
    stream(engine, spec_of("a"), 3)
    others = stream(engine, spec_of("b"), 3)
    both, page = engine.stats().cache_bytes, engine.stats().cache_capacity_bytes // 16
    engine.close("a")
    assert both == 6 * page
    assert equal([*others, pull(engine, "b")], alone)
    assert engine.stats().cache_bytes == 4 * page == sink.gauges["diagonal_kv_cache_bytes"]
    engine.close("b")
    engine.step()
    stats = engine.stats()
    assert (stats.active_sessions, stats.free_slots, stats.cache_bytes) == (0, 4, 0)
    assert sink.gauges["diagonal_kv_cache_bytes"] == sink.gauges["diagonal_sessions_active"] == 0


def test_a_session_closed_before_its_first_chunk_leaves_nothing() -> None:
    engine = engine_of()
    engine.open(spec_of())
    engine.request("s")
    engine.close("s")
    assert engine.step() == [] and engine.stats().active_sessions == 0


def test_a_done_session_holds_its_slot_until_it_is_closed() -> None:
    engine = engine_of()
    stream(engine, spec_of(frames=9))
    assert engine.stats().active_sessions == 1
    engine.close("s")
    engine.step()
    assert engine.stats().cache_bytes == engine.stats().active_sessions == 0


# One session's failure is its own


class PoisonedText:
    """Encodes the prompt `moves` to numbers that are none, and fails on `right`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, prompts: Sequence[str]) -> Tensor:
        if prompts == ["right"]:
            raise RuntimeError("the encoder gave up")
        found: Tensor = self.encoder.encode(prompts)
        return found * (float("nan") if prompts == ["moves"] else 1.0)


class BreakingDecoder(Decoder):
    """Fails once, on the call of that number."""

    def __init__(self, decoder: Decoder, fails_on: int) -> None:
        self.decoder, self.fails_on, self.calls = decoder, fails_on, 0

    def start(self) -> DecoderState:
        return self.decoder.start()

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_on:
            raise RuntimeError("the decoder gave up")
        return self.decoder.decode(latents, state)


def three(engine: Engine, middle: str = PROMPT) -> list[list[ChunkResult]]:
    """Three sessions side by side, two chunks of each that lives; results by step."""
    for name, prompt in (("a", PROMPT), ("b", middle), ("c", PROMPT)):
        engine.open(spec_of(name, prompt=prompt, seed=ord(name)))
    steps = []
    for names in ("abc", "ac"):
        for name in names:
            engine.request(name)
        steps.append(engine.step())
    return steps


def check_only_b_failed(engine: Engine, steps: list[list[ChunkResult]], message: str) -> None:
    errors = {result.session_id: result.error for results in steps for result in results if result.error}
    assert set(errors) == {"b"} and message in str(errors["b"])
    (failed,) = [result for result in steps[0] if result.session_id == "b"]
    assert failed.last and failed.chunk == 0 and len(failed.pixels) == 0
    for name in "ac":
        mine = [result for results in steps for result in results if result.session_id == name]
        assert [result.chunk for result in mine] == [0, 1] and [len(result.pixels) for result in mine] == [9, 12]
        alone = stream(engine_of(), spec_of(name, seed=ord(name)), 2)
        for result, expected in zip(mine, alone, strict=True):
            assert (result.pixels.int() - expected.pixels.int()).abs().max() <= 1
    stats = engine.stats()
    assert stats.active_sessions == 2 and stats.cache_bytes == stats.cache_capacity_bytes // 4


def test_latents_that_are_not_finite_end_their_session_alone() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine, "moves"), "not finite")


def test_a_prompt_that_cannot_be_encoded_ends_its_session_alone() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine, "right"), "the encoder gave up")


def test_a_decoder_that_fails_ends_its_session_alone() -> None:
    release = small_release()
    release.codec = BreakingDecoder(release.codec, fails_on=2)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine), "the decoder gave up")


def test_a_forward_that_fails_for_the_batch_is_run_again_one_by_one() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)

    def refuse(module: Any, inputs: Sequence[Tensor]) -> None:
        if not bool(torch.isfinite(inputs[2]).all()):
            raise RuntimeError("the kernel gave up")

    release.network.register_forward_pre_hook(refuse)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine, "moves"), "the kernel gave up")


def test_a_failed_sessions_pages_serve_the_next_one_unharmed() -> None:
    release = small_release("serve.max_sessions=1")
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    assert stream(engine, spec_of(prompt="moves"))[0].error is not None
    engine.step()
    assert engine.stats().cache_bytes == 0
    assert equal(stream(engine, spec_of()), stream(engine_of(), spec_of()))


# Order and batches


def test_the_session_with_the_least_slack_goes_first() -> None:
    clock = Clock()
    engine = engine_of("serve.batch_sessions=1", clock=clock)
    order = []
    for name in ("a", "b"):
        engine.open(spec_of(name))
    for _ in range(7):
        for name in ("a", "b"):
            engine.request(name)
        (result,) = engine.step()
        order.append((result.session_id, result.chunk))
        clock.now_s += 0.1 if len(order) < 3 else 0.0
    # Both new: by name. Then b, as it has shown nothing. a began first, so it runs dry first; then they take turns.
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)]


def test_only_sessions_that_asked_are_served() -> None:
    engine = engine_of()
    for name in ("a", "b"):
        engine.open(spec_of(name))
    engine.request("b")
    assert [result.session_id for result in engine.step()] == ["b"] and engine.step() == []


def rows_of(release: SmallRelease) -> list[int]:
    """The batch size of every forward from now on."""
    rows: list[int] = []
    release.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    return rows


def test_sessions_at_the_same_place_share_their_forwards() -> None:
    """Pixels of a batch are within 1 of 255 of those of a session alone."""
    release = small_release()
    rows, engine = rows_of(release), engine_of(release=release)
    for seed in range(3):
        engine.open(spec_of(str(seed), seed=seed))
    batched: list[list[ChunkResult]] = []
    for _ in range(6):
        for seed in range(3):
            engine.request(str(seed))
        batched.append(engine.step())
    assert rows == [3] * (4 + 3 + 2 * 4)
    for seed in range(3):
        for step, expected in enumerate(stream(engine_of(), spec_of(str(seed), seed=seed), 6)):
            assert (batched[step][seed].pixels.int() - expected.pixels.int()).abs().max() <= 1
            assert batched[step][seed].forwards == expected.forwards


def test_sessions_far_apart_share_a_forward_once_both_windows_are_full() -> None:
    release = small_release()
    engine, alone = engine_of(release=release), engine_of()
    stream(engine, spec_of("a"), 5)
    stream(engine, spec_of("b", seed=8), 3)
    expected = stream(alone, spec_of("a"), 6)[5], stream(alone, spec_of("b", seed=8), 4)[3]
    rows = rows_of(release)
    for name in ("a", "b"):
        engine.request(name)
    found = engine.step()
    assert rows == [2, 2] and sorted(result.chunk for result in found) == [3, 5]
    for result in found:
        other = expected[0] if result.session_id == "a" else expected[1]
        assert (result.pixels.int() - other.pixels.int()).abs().max() <= 1


def test_sessions_with_other_rows_or_another_length_of_context_do_not_share_a_forward() -> None:
    release = small_release()
    engine = engine_of(release=release)
    stream(engine, spec_of("a"), 2)
    stream(engine, spec_of("b"), 4)
    engine.open(spec_of("c"))
    engine.open(spec_of("d", schedule="5"))
    rows = rows_of(release)
    for name in "abcd":
        engine.request(name)
    served = [[result.session_id for result in engine.step()] for _ in range(4)]
    assert sorted(served) == [["a"], ["b"], ["c"], ["d"]] and set(rows) == {1}


# Going on elsewhere


def moved(engine: Engine, session_id: str = "s") -> tuple[Engine, int]:
    """A fresh engine that went on with the session, and the size of what was handed over."""
    data = pickle.dumps(engine.snapshot(session_id))
    engine.close(session_id)
    engine.step()
    elsewhere = engine_of()
    elsewhere.restore(pickle.loads(data))
    return elsewhere, len(data)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_before_the_first_eviction_a_session_goes_on_elsewhere_with_the_same_pixels(chunks: int) -> None:
    plain, engine = stream(engine_of(), spec_of()), engine_of()
    stream(engine, spec_of(), chunks)
    elsewhere, _ = moved(engine)
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
    def size(sessions: int) -> int:
        engine = engine_of()
        for number in range(sessions):
            engine.open(spec_of(str(number)))
        for _ in range(5):
            for number in range(sessions):
                engine.request(str(number))
            engine.step()
        return moved(engine, "0")[1]

    assert size(4) == size(1)


def test_only_a_session_under_way_can_be_handed_on() -> None:
    engine = engine_of()
    engine.open(spec_of(frames=9))
    with pytest.raises(FieldError, match="session = 's'"):
        engine.snapshot("s")
    pull(engine)
    with pytest.raises(FieldError, match="session = 's'.*has not ended"):
        engine.snapshot("s")


def test_a_session_that_cannot_be_taken_over_leaves_its_slot_free() -> None:
    engine, full = engine_of(), engine_of("serve.max_sessions=1")
    stream(engine, spec_of(), 2)
    snapshot = engine.snapshot("s")
    full.open(spec_of("other"))
    with pytest.raises(CapacityError):
        full.restore(snapshot)
    release = small_release()
    release.codec = BreakingDecoder(release.codec, fails_on=1)
    broken = engine_of(release=release)
    with pytest.raises(RuntimeError, match="the decoder gave up"):
        broken.restore(snapshot)
    broken.step()
    assert broken.stats().active_sessions == broken.stats().cache_bytes == 0
    broken.restore(snapshot)
    assert torch.equal(pull(broken).pixels, pull(engine).pixels)
