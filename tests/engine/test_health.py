"""Whether the engine is well: chunks that fail in a row, the exercise, and the one host sync of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.engine.chunk_maker import Emitted, SessionError
from diagonal.engine.engine import Engine, Health
from diagonal.engine.model_runner import emit
from tests.engine.driving import BreakingDecoder, PoisonedText, engine_of, equal, pull, spec_of, stream
from tests.networks import SmallRelease, draw, small_release
from tests.recorded_metrics import RecordedMetrics


def poisoned() -> SmallRelease:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)
    return release


def fail(engine: Engine, times: int, prompt: str = "right") -> None:
    for number in range(times):
        engine.open(spec_of(f"bad{number}", prompt=prompt))
        assert pull(engine, f"bad{number}").error is not None


@pytest.mark.parametrize("prompt", ["right", "moves"])
def test_three_failures_in_a_row_are_unhealthy_until_a_chunk_comes_out(prompt: str) -> None:
    engine = engine_of(release=poisoned())
    fail(engine, 2, prompt)
    assert engine.health() == Health(True, 2)
    stream(engine, spec_of("good"), 1)
    assert engine.health() == Health(True, 0)
    fail(engine, 3, prompt)
    assert engine.health() == Health(False, 3)
    pull(engine, "good")
    assert engine.health() == Health(True, 0)


def test_an_exercise_tells_sessions_that_were_at_fault_from_an_engine_that_is() -> None:
    release = poisoned()
    engine = engine_of(release=release)
    fail(engine, 3)
    assert engine.exercise() and engine.health() == Health(True, 0)

    def refuse(module: Any, inputs: Any) -> None:
        raise RuntimeError("the device is gone")

    hook = release.network.register_forward_pre_hook(refuse)
    assert [engine.exercise() for _ in range(3)] == [False] * 3
    assert engine.health() == Health(False, 3) and engine.stats().cache_bytes == 0
    hook.remove()
    assert engine.exercise() and engine.health().healthy


def test_an_exercise_leaves_sessions_and_memory_as_they_are() -> None:
    engine, plain = engine_of(), stream(engine_of(), spec_of(), 4)
    found = stream(engine, spec_of(), 2)
    bytes_before = engine.stats().cache_bytes
    assert engine.exercise()
    assert engine.stats().cache_bytes == bytes_before and engine.stats().active_sessions == 1
    assert equal([*found, pull(engine), pull(engine)], plain)


def test_an_exercise_needs_no_page_that_a_session_holds() -> None:
    engine = engine_of("serve.max_sessions=1")
    stream(engine, spec_of(), 5)
    assert engine.maker.pool.free_pages == 0 and engine.exercise()
    assert pull(engine).error is None


def test_an_exercise_sees_latents_that_are_not_finite_and_a_decoder_that_fails() -> None:
    release = small_release()
    with torch.no_grad():
        release.network.proj_out.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    assert not engine_of(release=release).exercise()
    broken = small_release()
    broken.codec = BreakingDecoder(broken.codec, fails_on=1)
    engine = engine_of(release=broken)
    assert not engine.exercise() and engine.exercise()


def test_an_engine_that_cannot_make_a_chunk_does_not_get_through_its_warm_up() -> None:
    release = small_release()
    release.codec = BreakingDecoder(release.codec, fails_on=5)
    engine = engine_of(release=release)
    with pytest.raises(SessionError, match="the decoder gave up"):
        engine.warm_up()
    assert engine.stats().cache_bytes == 0


# The step's one host sync


def test_a_step_brings_all_its_results_over_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tensor.cpu` is the sync; on a GPU a truth value, an `.item()` or a `.tolist()` would be another.

    The text encoder, which has its own, runs when a prompt comes: here before."""
    engine = engine_of()
    for name in "abc":
        stream(engine, spec_of(name, seed=ord(name)), 1)
    syncs: list[str] = []
    for name in ("cpu", "item", "tolist", "__bool__"):
        plain = getattr(torch.Tensor, name)

        def counted(self: Tensor, *arguments: Any, name: str = name, plain: Any = plain) -> Any:
            on_host = name != "cpu" and self.untyped_storage().data_ptr() in emitted
            if not on_host:
                syncs.append(name)
            found = plain(self, *arguments)
            if name == "cpu":
                emitted.add(found.untyped_storage().data_ptr())
            return found

        monkeypatch.setattr(torch.Tensor, name, counted)
    emitted: set[int] = set()
    for _ in range(2):
        for name in "abc":
            engine.request(name)
        assert len(engine.step()) == 3
    assert syncs == ["cpu", "cpu"], "one a step"


FINE = torch.tensor(True)


def parts_of(*values: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Pixels, clean and written latents of sessions; the clean ones hold one value."""
    pixels = [torch.full((2, 4, 4, 3), number, dtype=torch.uint8) for number in range(len(values))]
    clean = [torch.full((1, 3, 2, 2), value) for value in values]
    return pixels, clean, [draw(1, 3, 2, 2, seed=number) for number in range(len(values))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_emitted_is_each_sessions_own_and_only_what_is_finite(dtype: torch.dtype) -> None:
    pixels, clean, written = parts_of(0.1, float("inf"), 1e30, float("nan"))
    found = emit(pixels, clean, written, dtype, [FINE] * 4)
    for number in (0, 2):
        shown = found[number]
        assert isinstance(shown, Emitted) and torch.equal(shown.pixels, pixels[number])
        for mine, theirs in ((shown.clean, clean), (shown.written, written)):
            assert torch.equal(mine, theirs[number].to(dtype)) and mine.dtype == dtype
            assert mine.untyped_storage().nbytes() == mine.nbytes, "no memory shared with another session"
    for number in (1, 3):
        refused = found[number]
        assert isinstance(refused, SessionError) and refused.code == "not_finite"


def test_what_cannot_be_brought_over_together_is_brought_over_one_by_one() -> None:
    pixels, clean, written = parts_of(0.0, 0.0, 0.0)
    pixels[1] = torch.zeros(2, 9, 9, 3, dtype=torch.uint8)
    written[2] = torch.zeros(1, 3, 2, 2, device="meta")
    found = emit(pixels, clean, written, torch.float32, [FINE] * 3)
    assert [isinstance(shown, Emitted) for shown in found] == [True, True, False]
    assert isinstance(found[1], Emitted) and torch.equal(found[1].pixels, pixels[1])
    assert isinstance(found[2], SessionError) and found[2].code == "decode_failed"


# Every failure has a code


def codes(engine: Engine, names: Sequence[str]) -> dict[str, str | None]:
    for name in names:
        engine.request(name)
    return {result.session_id: result.code for result in engine.step()}


def test_a_failure_of_the_pool_ends_its_session_alone() -> None:
    engine = engine_of("serve.max_sessions=2", metrics=(metrics := RecordedMetrics()))
    stream(engine, spec_of("a"), 2)
    stream(engine, spec_of("b"), 2)
    taken = [engine.maker.pool.take() for _ in range(engine.maker.pool.free_pages - 1)]
    assert codes(engine, "ab") == {"b": "out_of_memory", "a": None}
    assert metrics.total("diagonal_session_failures_total") == 1
    for page in taken:
        engine.maker.pool.give_back(page)
    assert codes(engine, "a") == {"a": None} and engine.stats().active_sessions == 1


def test_an_allocation_that_fails_in_the_shared_forward_ends_nobody_who_fits_alone() -> None:
    release = small_release()

    def refuse(module: Any, inputs: Any) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    release.network.register_forward_pre_hook(refuse)
    engine = engine_of(release=release)
    for name in "ab":
        engine.open(spec_of(name))
    assert codes(engine, "ab") == {"a": None, "b": None} and engine.health() == Health(True, 0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        ZeroDivisionError,
        AttributeError,
        AssertionError,
        OSError,
        MemoryError,
        UnicodeError,
    ],
)
def test_whatever_a_prompt_makes_the_encoder_raise_is_its_sessions_end_alone(error: type[Exception]) -> None:
    release = small_release()
    encode = release.encoder.encode

    class Failing:
        def encode(self, prompts: Sequence[str]) -> Tensor:
            if prompts == ["right"]:
                raise error("x")
            found: Tensor = encode(prompts)
            return found

    release.encoder = Failing()
    engine = engine_of(release=release)
    engine.open(spec_of("bad", prompt="right"))
    engine.open(spec_of("good"))
    wanted = "out_of_memory" if error is MemoryError else "prompt_failed"
    assert codes(engine, ["bad", "good"]) == {"bad": wanted, "good": None}


def test_a_session_closed_during_its_chunk_is_freed_with_that_step() -> None:
    from tests.engine.driving import meanwhile

    engine = engine_of()
    plain = stream(engine_of(), spec_of("b", seed=4), 2)
    for name, seed in (("a", 3), ("b", 4)):
        stream(engine, spec_of(name, seed=seed), 1)
    meanwhile(engine, lambda: engine.close("a"))
    for name in "ab":
        engine.request(name)
    (result,) = engine.step()
    assert result.session_id == "b" and (result.pixels.int() - plain[1].pixels.int()).abs().max() <= 1
    stats = engine.stats()
    assert stats.active_sessions == 1 and stats.cache_bytes == 2 * engine.maker.pool.page_bytes
